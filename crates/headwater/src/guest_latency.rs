//! What guests are promised while copies run, as people write it: `2ms`, `500us`, `1.5s`, or `default`.

use headwater_job::GuestLatencyGoal;
use std::time::Duration;

/// What may stand behind a number, and nanoseconds in it.
const UNITS: [(&str, f64); 3] = [("us", 1e3), ("ms", 1e6), ("s", 1e9)];

/// Reads a time that copies may add to the 99th percentile of guests' requests, or `default`.
///
/// # Errors
/// Says what is wrong with `text`.
pub fn parse(text: &str) -> Result<GuestLatencyGoal, String> {
    if text == "default" {
        return Ok(GuestLatencyGoal::Relative);
    }
    let parsed = UNITS.iter().find_map(|(unit, nanos)| {
        let number = text.strip_suffix(unit)?;
        let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
        number.parse::<f64>().ok().filter(|_| plain).map(|number| number * nanos)
    });
    match parsed {
        // Less than a clock tells apart from nothing would only be a way to write that copies stop; more than a minute is no wait for a disk.
        Some(nanos) if (1e3..=60e9).contains(&nanos) => {
            Ok(GuestLatencyGoal::Added(Duration::from_nanos(nanos as u64)))
        }
        _ => Err(format!(
            "'{text}' is no time that copies may add: write one from 1us to 60s (500us, 2ms), or default"
        )),
    }
}

/// As it is written.
pub fn text(goal: GuestLatencyGoal) -> String {
    match goal {
        GuestLatencyGoal::Relative => "default".to_owned(),
        GuestLatencyGoal::Added(time) => format!("{}us", time.as_nanos() as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        for (written, micros) in [("2ms", 2_000), ("500us", 500), ("1.5s", 1_500_000), ("60s", 60_000_000)] {
            let goal = GuestLatencyGoal::Added(Duration::from_micros(micros));
            assert_eq!(parse(written), Ok(goal));
            assert_eq!(parse(&text(goal)), Ok(goal));
        }
        assert_eq!(parse(&text(GuestLatencyGoal::Relative)), Ok(GuestLatencyGoal::Relative));
    }

    #[test]
    fn nonsense_is_refused() {
        for wrong in ["", "2", "ms", "-1ms", "1e3ms", "nanms", "0ms", "61s", "2 ms", "infs", "1m"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
