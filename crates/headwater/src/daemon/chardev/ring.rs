//! A ring of bytes as a character device (`ringbuf`): what is written to it can be read once, and what doesn't fit pushes the oldest out.

use crate::daemon::failure::{Refusal, generic};
use crate::daemon::graph::open::{Options, Read};
use base64::prelude::{BASE64_STANDARD, Engine};
use std::cell::RefCell;
use std::collections::VecDeque;

/// How many bytes it holds if nobody says.
const SIZE: i64 = 64 << 10;

/// The most that can be asked for, in bytes.
const MOST: i64 = 1 << 30;

/// The bytes, and how many there may be.
pub(super) struct Ring {
    bytes: RefCell<VecDeque<u8>>,
    size: usize,
}

impl Ring {
    /// An empty one, as `chardev-add` asks for it.
    ///
    /// # Errors
    /// If it can't have that size.
    pub(super) fn new(data: &Options) -> Result<Self, Refusal> {
        let size =
            data.get("size").and_then(serde_json::Value::as_i64).filter(|size| *size != 0).unwrap_or(SIZE);
        match usize::try_from(size) {
            Ok(size) if size.is_power_of_two() => {}
            _ => return Err(generic("size of ringbuf chardev must be power of two")),
        }
        if size > MOST {
            return Err(generic(format!("a ringbuf chardev holds {MOST} bytes at most")));
        }
        Ok(Self { bytes: RefCell::default(), size: size as usize })
    }

    /// `ringbuf-write`.
    ///
    /// # Errors
    /// If the data aren't in the format that they are said to be in.
    pub(super) fn write(&self, args: &Options) -> Result<(), Refusal> {
        let text = args.text("data").unwrap_or_default();
        let decoded;
        let data = match args.text("format") {
            Some("base64") => {
                let not_base64 = |_| generic("Base64 data contains invalid characters");
                decoded = BASE64_STANDARD.decode(text).map_err(not_base64)?;
                &decoded[..]
            }
            _ => text.as_bytes(),
        };
        let mut bytes = self.bytes.borrow_mut();
        bytes.extend(&data[data.len().saturating_sub(self.size)..]);
        let over = bytes.len().saturating_sub(self.size);
        bytes.drain(..over);
        Ok(())
    }

    /// `ringbuf-read`: the oldest bytes, which are taken out.
    ///
    /// # Errors
    /// If none are asked for.
    pub(super) fn read(&self, args: &Options) -> Result<String, Refusal> {
        let wanted = args.number("size").and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
        let wanted = wanted.ok_or_else(|| generic("size must be greater than zero"))?;
        let mut bytes = self.bytes.borrow_mut();
        let taken = wanted.min(bytes.len());
        let taken: Vec<u8> = bytes.drain(..taken).collect();
        Ok(match args.text("format") {
            Some("base64") => BASE64_STANDARD.encode(&taken),
            _ => String::from_utf8_lossy(&taken).into_owned(),
        })
    }
}
