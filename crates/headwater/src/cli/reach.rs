//! Options about a remote image that can't be reached, or doesn't answer.

use clap::Args;
use headwater_block::Patience;
use std::time::Duration;

/// How long storage itself tries a request again if nobody waits above, and if somebody does.
const RETRY: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(2));

/// How remote images are reached.
#[derive(Debug, Clone, Args)]
pub struct ReachArgs {
    /// For how long a client's request is held when a remote image can't be reached, before it fails: a number of seconds, or `forever`. It goes on as
    /// soon as the image can be reached again. 0 holds nothing.
    #[arg(long, value_name = "SECONDS|forever", default_value = "600", value_parser = parse_patience)]
    pub hold: Patience,
    /// For how many seconds a remote server may send nothing, or hardly anything (HTTP: less than 4 KiB a second), while it is to send something; then the
    /// request is made again, for what hasn't come.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: u32,
    /// For how many seconds one request to a remote server is made again at once, before it counts as failed and is held. By default 2; 10 if
    /// nothing is held.
    #[arg(long, value_name = "SECONDS")]
    pub retry: Option<u32>,
}

impl ReachArgs {
    /// The longest silence.
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.into())
    }

    /// For how long storage tries by itself. `patience` is how long those above wait, all of them.
    pub fn retry(&self, patience: &[Patience]) -> Duration {
        let waits = patience.iter().all(|patience| patience.lasts(Duration::ZERO));
        let by_default = if waits { RETRY.1 } else { RETRY.0 };
        self.retry.map_or(by_default, |seconds| Duration::from_secs(seconds.into()))
    }
}

/// A number of seconds, or `forever`.
///
/// # Errors
/// Says what it would take.
pub fn parse_patience(text: &str) -> Result<Patience, String> {
    match (text, text.parse::<u32>()) {
        ("forever", _) => Ok(Patience::Forever),
        (_, Ok(0)) => Ok(Patience::None),
        (_, Ok(seconds)) => Ok(Patience::For(Duration::from_secs(seconds.into()))),
        _ => Err(format!("'{text}' is neither a number of seconds nor `forever`")),
    }
}

/// As [`parse_patience`] reads it.
pub fn show_patience(patience: Patience) -> String {
    match patience {
        Patience::None => "0".to_owned(),
        Patience::For(time) => time.as_secs().to_string(),
        Patience::Forever => "forever".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shorter_way_is_taken_where_somebody_waits() {
        let args = |retry| ReachArgs { hold: Patience::Forever, timeout: 30, retry };
        assert_eq!(args(None).retry(&[Patience::Forever, Patience::For(RETRY.0)]), RETRY.1);
        assert_eq!(args(None).retry(&[Patience::Forever, Patience::None]), RETRY.0);
        assert_eq!(args(Some(7)).retry(&[Patience::None]), Duration::from_secs(7));
        assert_eq!(parse_patience("0"), Ok(Patience::None));
        assert_eq!(parse_patience("90"), Ok(Patience::For(Duration::from_secs(90))));
        for text in ["0", "90", "forever"] {
            assert_eq!(parse_patience(text).map(show_patience).as_deref(), Ok(text));
        }
        assert!(parse_patience("-1").is_err() && parse_patience("never").is_err());
    }
}
