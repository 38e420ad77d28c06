//! The older option syntax, of `--chardev` and `--trace`: `key=value,key=value`, without nesting.
//!
//! What differs from [`crate::keyval`]: a key without a value is a switch, on or, after `no`, off; keys outside a fixed list
//! are refused; values have the types of that list. A chardev is turned into the `ChardevBackend` that QEMU's `chardev-add` takes.

mod chardev;
mod trace;

use crate::error::QmpError;
use crate::keyval::unescape_value;
use crate::schema::{NumberError, bool_from_text, size_from_text, uint_from_text};

pub use chardev::{Chardev, ParsedChardev, parse_chardev};
pub use trace::{Trace, parse_trace};

/// What a key's value must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Switch,
    Number,
    Size,
}

/// The keys of an option.
type Keys = &'static [(&'static str, Kind)];

/// An option's keys and values, in the order given.
#[derive(Debug, Default)]
struct Opts {
    pairs: Vec<(String, String)>,
    help: bool,
    /// What to warn of: switches without a value.
    warnings: Vec<String>,
}

impl Opts {
    /// Reads `text`. A first value that stands alone belongs to `implied_key`.
    fn parse(text: &str, implied_key: &str) -> Result<Self, QmpError> {
        let mut opts = Self::default();
        let mut rest = text;
        let mut first = true;
        while !rest.is_empty() {
            let end = rest.find([',', '=']).unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            let has_value = after.starts_with('=');
            let (key, value);
            if let Some(after) = after.strip_prefix('=') {
                key = word.to_owned();
                (value, rest) = unescape_value(after);
            } else {
                let alone;
                (alone, rest) = unescape_value(rest);
                match alone.as_str() {
                    "help" | "?" => {
                        opts.help = true;
                        first = false;
                        continue;
                    }
                    _ if first => (key, value) = (implied_key.to_owned(), alone),
                    _ => (key, value) = opts.switch(&alone),
                }
            }
            if key.is_empty() && has_value {
                return Err(QmpError::invalid_parameter(""));
            }
            first = false;
            opts.pairs.push((key, value));
        }
        Ok(opts)
    }

    /// A key without a value.
    fn switch(&mut self, word: &str) -> (String, String) {
        // "nodelay" is the name of a key, not the opposite of "delay".
        let (key, value) = match word.strip_prefix("no") {
            Some(key) if key != "delay" => (key, "off"),
            _ => (word, "on"),
        };
        self.warnings
            .push(format!("short-form boolean option '{word}' deprecated\nPlease use {key}={value} instead"));
        (key.to_owned(), value.to_owned())
    }

    /// Refuses keys that are not in the list, and values that aren't of their type.
    fn check(&self, keys: Keys) -> Result<(), QmpError> {
        for (key, value) in &self.pairs {
            let known = keys.iter().find(|(name, _)| name == key);
            let (_, kind) = known.ok_or_else(|| QmpError::invalid_parameter(key))?;
            kind.check(key, value)?;
        }
        Ok(())
    }

    /// The value of a key. The last one counts.
    fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    fn text(&self, key: &str) -> Option<String> {
        self.get(key).map(str::to_owned)
    }

    fn switched(&self, key: &str) -> Option<bool> {
        self.get(key).and_then(bool_from_text)
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(|text| uint_from_text(text).ok())
    }
}

impl Kind {
    fn check(self, key: &str, value: &str) -> Result<(), QmpError> {
        let (number, expected, range) = match self {
            Self::Text => return Ok(()),
            Self::Switch if bool_from_text(value).is_some() => return Ok(()),
            Self::Switch => return Err(QmpError::expects(key, "'on' or 'off'")),
            Self::Number => (uint_from_text(value), "a number", "too large"),
            Self::Size => (size_from_text(value), "a non-negative number below 2^64", "out of range"),
        };
        match number {
            Ok(_) => Ok(()),
            Err(NumberError::Syntax) => Err(QmpError::expects(key, expected)),
            Err(NumberError::Range) => {
                Err(QmpError::generic(format!("Value '{value}' is {range} for parameter '{key}'")))
            }
        }
    }
}

#[cfg(test)]
mod tests;
