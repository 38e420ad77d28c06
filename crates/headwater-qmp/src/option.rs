//! Options of the command line, read and checked by the schema: `--blockdev`, `--export`, `--nbd-server`, `--object`,
//! `--monitor`.
//!
//! Each may be written as `key=value,...` or as JSON, which begins with `{`.

use serde_json::{Map, Value};

use crate::error::QmpError;
use crate::schema::{self, Source};
use crate::{json, keyval};

/// Which option it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OptionKind {
    /// `--blockdev`: a `BlockdevOptions`.
    Blockdev,
    /// `--export`: a `BlockExportOptions`.
    Export,
    /// `--nbd-server`: an `NbdServerOptions`.
    NbdServer,
    /// `--object`: an `ObjectOptions`.
    Object,
    /// `--monitor`: a `MonitorOptions`.
    Monitor,
}

/// What an option says.
#[derive(Clone, Debug, PartialEq)]
pub enum Parsed {
    /// An object as QMP would have sent it, checked.
    Value(Map<String, Value>),
    /// It asks for help; with what else it says, not checked. Only `--object` has any.
    Help(Map<String, Value>),
}

impl OptionKind {
    /// The key of a first value that stands alone.
    pub fn implied_key(self) -> Option<&'static str> {
        match self {
            Self::Blockdev => Some("driver"),
            Self::Export => Some("type"),
            Self::NbdServer => None,
            Self::Object => Some("qom-type"),
            Self::Monitor => Some("chardev"),
        }
    }

    /// The type in the schema.
    pub fn type_name(self) -> &'static str {
        match self {
            Self::Blockdev => "BlockdevOptions",
            Self::Export => "BlockExportOptions",
            Self::NbdServer => "NbdServerOptions",
            Self::Object => "ObjectOptions",
            Self::Monitor => "MonitorOptions",
        }
    }
}

/// Reads an option and checks it.
pub fn parse(kind: OptionKind, text: &str) -> Result<Parsed, QmpError> {
    let (value, source) = if text.starts_with('{') {
        (json::from_text(text)?, Source::Json)
    } else {
        let keyval = keyval::parse(text, kind.implied_key())?;
        match (keyval.help, kind) {
            (true, OptionKind::Object) => return Ok(Parsed::Help(keyval.tree)),
            (true, _) => return Err(QmpError::generic("Help is not available for this option")),
            (false, _) => (Value::Object(keyval.tree), Source::Keyval),
        }
    };
    match schema::check_type(kind.type_name(), value, source)? {
        Value::Object(members) => Ok(Parsed::Value(members)),
        other => Err(QmpError::generic(format!("expected an object, got {other}"))),
    }
}

/// Whether `text` may name a job, a chardev or an object: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

/// Refuses a name that is no identifier.
///
/// QEMU adds a line with the rule where a person reads the error; over QMP it says no more than this.
pub fn check_identifier(parameter: &str, text: &str) -> Result<(), QmpError> {
    if is_identifier(text) { Ok(()) } else { Err(QmpError::expects(parameter, "an identifier")) }
}

#[cfg(test)]
mod tests;
