//! `--trace [[enable=]PATTERN][,events=FILE][,file=FILE]`.

use super::{Keys, Kind, Opts};
use crate::error::QmpError;

const KEYS: Keys = &[("enable", Kind::Text), ("events", Kind::Text), ("file", Kind::Text)];

/// What `--trace` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Pattern of the events to trace.
    pub enable: Option<String>,
    /// A file with patterns, one a line.
    pub events: Option<String>,
    /// Where the trace goes.
    pub file: Option<String>,
    /// It asks for the list of events. (The pattern `help` does as well.)
    pub help: bool,
    /// What to warn of.
    pub warnings: Vec<String>,
}

/// Reads the value of `--trace`.
pub fn parse_trace(text: &str) -> Result<Trace, QmpError> {
    let opts = Opts::parse(text, "enable")?;
    opts.check(KEYS)?;
    Ok(Trace {
        enable: opts.text("enable"),
        events: opts.text("events"),
        file: opts.text("file"),
        help: opts.help,
        warnings: opts.warnings,
    })
}
