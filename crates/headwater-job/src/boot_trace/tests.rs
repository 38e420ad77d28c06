//! Traces as text, hostile ones among them, and the set of bytes against a naive one.

use super::*;
use headwater_block::TokioClock;
use proptest::prelude::*;

fn parse(lines: &str) -> Result<BootTrace> {
    BootTrace::parse(&format!("{TITLE}\n{lines}"))
}

#[test]
fn a_trace_is_read_as_it_was_written() {
    let recorder = BootRecorder::new(Rc::new(TokioClock::new()));
    for range in [8192..8200, 12288..16384, 8192..20000, 0..1] {
        recorder.reads(&range);
    }
    let trace = recorder.take_changed().expect("it has changed");
    assert!(recorder.take_changed().is_none());
    assert_eq!(trace.ranges(1 << 20, 4096), [8192..20480, 0..4096]);
    assert_eq!(BootTrace::parse(&trace.to_string()).unwrap().ranges(1 << 20, 4096), [8192..20480, 0..4096]);
}

#[test]
fn ranges_keep_their_order_in_whole_units_within_the_disk() {
    let trace =
        parse("0 200000 1\n1 0 10\n# nothing\n2 196608 65536\n\n3 900000 999999999\n4 5000000 1\n5 0 0\n")
            .unwrap();
    assert_eq!(trace.len(), 6);
    assert_eq!(trace.ranges(1_000_000, 65536), [196608..262144, 0..65536, 851968..1_000_000]);
    assert_eq!(trace.ranges(0, 65536), []);
}

#[test]
fn what_is_no_trace_is_refused_with_its_line() {
    let no = |text: &str, line: &str| {
        let err = BootTrace::parse(text).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::InvalidInput);
        assert!(err.to_string().contains(line), "{err}");
    };
    no("", "line 1");
    no("headwater boot trace 2\n", "line 1");
    for (wrong, line) in [
        ("1 2", "line 2"),
        ("1 2 3 4", "line 2"),
        ("1 2 -3", "line 2"),
        ("0 0 1\nx y z", "line 3"),
        ("0 18446744073709551615 1", "past"),
        ("99999999999999999999 0 1", "line 2"),
    ] {
        no(&format!("{TITLE}\n{wrong}\n"), line);
    }
    no(&format!("{TITLE}\n{}", "0 0 1\n".repeat(MOST_RANGES + 1)), "at most");
}

proptest! {
    #[test]
    fn what_is_new_is_what_was_not_there(ranges in prop::collection::vec((0u64..60, 0u64..20), 0..40)) {
        let mut seen = Seen::default();
        let mut naive = [false; 100];
        for (start, len) in ranges {
            if len == 0 {
                continue;
            }
            let mut new = [false; 100];
            for part in seen.add(start..start + len) {
                prop_assert!(!part.is_empty());
                part.for_each(|at| new[at as usize] = true);
            }
            for at in 0..100u64 {
                let wanted = (start..start + len).contains(&at) && !naive[at as usize];
                prop_assert_eq!(new[at as usize], wanted);
            }
            (start..start + len).for_each(|at| naive[at as usize] = true);
            let runs = seen.0.iter().collect::<Vec<_>>();
            prop_assert!(runs.windows(2).all(|two| two[0].1 < two[1].0), "ranges that touch are one");
        }
    }

    #[test]
    fn any_text_is_read_or_refused(text in ".{0,200}") {
        let _ = BootTrace::parse(&text);
        if let Ok(trace) = parse(&text) {
            trace.ranges(1 << 30, 512);
        }
    }
}
