//! How far a stream is, as people and programs read it.

use crate::mirrors::MirrorsStatus;
use crate::receipt::Receipt;
use crate::size::human;
use serde::Serialize;

/// How far a stream is. Bytes are guest bytes; this is what `--json` prints, one object a line.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Status {
    /// "running", "paused", "completed", ... as the job says.
    pub state: String,
    /// Bytes that were to be copied and are local now, whoever brought them.
    pub copied: u64,
    /// Bytes that must be copied in all. Grows until all of the source has been looked at.
    pub total: u64,
    /// `total` is final.
    pub total_is_exact: bool,
    /// Bytes that are still to be copied, of `total`.
    pub remaining: u64,
    /// Bytes of storage that the rest takes, in the disk's file system; an estimate as long as `total` is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub space_needed: Option<u64>,
    /// Bytes that are free there, as last asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub space_free: Option<u64>,
    /// Bytes that became zeroes, which take no space.
    pub zeroes: u64,
    /// Bytes copied a second, of late.
    pub rate: u64,
    /// The limit on `rate`; 0 is none.
    pub rate_limit: u64,
    /// Seconds until the end at this rate; absent while that can't be said.
    pub eta_seconds: Option<f64>,
    /// Guest reads that went to the source at least in part.
    pub guest_source_reads: u64,
    /// Guest reads in all.
    pub guest_reads: u64,
    /// Guest writes, zero-writes and discards in all.
    pub guest_writes: u64,
    /// Guest requests that are held right now, because the source can't be reached.
    pub held: u32,
    /// Guest requests that were held, in all.
    pub held_in_all: u64,
    /// The longest time that one was held; of those that are held now, nothing is in it yet.
    pub longest_hold_seconds: f64,
    /// How often held requests were tried again.
    pub retries: u64,
    /// How often the source could not be reached.
    pub outages: u64,
    /// Seconds since the start of this run.
    pub elapsed_seconds: f64,
    /// What copying waits for, paused by itself: "source". It goes on by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
    /// The sources, if there are mirrors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mirrors: Option<MirrorsStatus>,
    /// On the last line only, when everything has been copied: what was verified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
    /// Why the stream waits, when it stopped for an error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_for: Option<String>,
    /// On the last line only: "completed", "cancelled", "interrupted" or "failed".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<&'static str>,
    /// On the last line only: what went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The text beside the bar.
pub(crate) fn line(status: &Status) -> String {
    let mut text = format!("{} of {}", human(status.copied), human(status.total));
    if status.state == "running" {
        text += &format!("  {}/s", human(status.rate));
        if let Some(eta) = status.eta_seconds {
            text += &format!("  {} left", clock(eta.round() as u64));
        }
    } else if let Some(what) = &status.waits_for {
        text += &format!("  waits for the {what}");
    } else {
        text += &format!("  {}", status.state);
    }
    if let Some(why) = &status.waiting_for {
        text += &format!(" ({why})");
    }
    if status.held > 0 {
        text += &format!("  {} guest requests are held", status.held);
    }
    if status.guest_source_reads > 0 {
        text += &format!("  {} guest reads from the source", status.guest_source_reads);
    }
    text
}

/// Seconds as minutes, hours, days.
fn clock(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes}:{:02}", seconds % 60),
        3600..86400 => format!("{hours}:{:02} h", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_fits_a_line() {
        let status = Status {
            state: "running".into(),
            copied: 3 << 30,
            total: 10 << 30,
            rate: 200 << 20,
            eta_seconds: Some(3700.0),
            guest_source_reads: 12,
            ..Status::default()
        };
        assert_eq!(line(&status), "3 GiB of 10 GiB  200 MiB/s  1:01 h left  12 guest reads from the source");
        let waiting = Status { state: "waiting".into(), waiting_for: Some("disk full".into()), ..status };
        assert!(line(&waiting).contains("waiting (disk full)"));
    }

    #[test]
    fn times_are_short() {
        for (seconds, text) in [(0, "0 s"), (59, "59 s"), (61, "1:01"), (3600, "1:00 h"), (90000, "1 d 1 h")]
        {
            assert_eq!(clock(seconds), text);
        }
    }
}
