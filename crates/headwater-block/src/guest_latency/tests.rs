//! The buckets against a sorted list, and what counts as quiet.

use super::*;
use proptest::prelude::*;

const fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

proptest! {
    #[test]
    fn quantiles_are_those_of_a_sorted_list_within_a_bucket(
        mut times in prop::collection::vec(5_000_u64..60_000_000_000, 1..300), part in 0.0_f64..=1.0,
    ) {
        let mut histogram = Histogram::default();
        for time in &times {
            histogram.add(Duration::from_nanos(*time));
        }
        times.sort_unstable();
        let rank = ((times.len() as f64 * part).ceil() as usize).max(1);
        let exact = times[rank - 1];
        let told = histogram.quantile(part).unwrap().as_nanos() as u64;
        prop_assert!(told > exact && told <= exact + exact / 8, "{told} for {exact}");
        let over = times.iter().filter(|time| **time > exact).count() as u32;
        prop_assert!(histogram.over(Duration::from_nanos(exact)) <= over);
        prop_assert_eq!(histogram.len() as usize, times.len());
    }

    #[test]
    fn any_time_has_a_bucket(nanos: u64) {
        let mut histogram = Histogram::default();
        histogram.add(Duration::from_nanos(nanos));
        prop_assert!(histogram.over(Duration::from_nanos(nanos)) == 0);
        prop_assert!(histogram.quantile(0.5).is_some());
    }
}

#[test]
fn what_fades_keeps_its_shape() {
    let mut histogram = Histogram::default();
    for n in 1..=1000 {
        histogram.add(us(100 + n % 10));
    }
    let before = histogram.quantile(0.5);
    histogram.fade();
    assert!(histogram.len() <= 500 && histogram.len() > 490);
    assert_eq!(histogram.quantile(0.5), before);
}

#[test]
fn a_request_is_quiet_only_if_no_copy_was_there_at_any_time() {
    let meter = Rc::new(GuestLatency::default());
    let _watching = meter.watch();
    let request = |between: &dyn Fn()| {
        let start = meter.comes(us(0));
        between();
        meter.goes(Some(Kind::Read), start, us(80));
        let seen = meter.take();
        (seen.quiet[0].len(), seen.busy[0].len())
    };
    assert_eq!(request(&|| {}), (1, 0));
    // One that began and ended meanwhile.
    assert_eq!(request(&|| drop(meter.copying())), (0, 1));
    let copy = meter.copying();
    assert_eq!(request(&|| {}), (0, 1));
    let copy = Cell::new(Some(copy));
    assert_eq!(request(&|| drop(copy.take())), (0, 1));
    assert_eq!(request(&|| {}), (1, 0));
}
