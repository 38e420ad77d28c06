//! The text of values that are sent, byte for byte as QEMU writes it: ASCII only, doubles with 17 significant digits.

use std::io;

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

/// How a message is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// One line.
    #[default]
    Compact,
    /// One line for each member and element, indented by four spaces for each level (`pretty=on`).
    Pretty,
}

/// The text of `message` with the end of the line, as a monitor sends it.
///
/// Lines end in CR LF, also those within a pretty message.
///
/// # Panics
/// If `message` fails to serialize or has a map with keys that are no strings. The types of [`crate::message`] and
/// [`serde_json::Value`] don't.
pub fn encode(message: &impl Serialize, style: Style) -> Vec<u8> {
    let mut serializer = Serializer::with_formatter(Vec::new(), Layout::new(style));
    message.serialize(&mut serializer).expect("a message serializes, and a vector takes every write");
    let mut bytes = serializer.into_inner();
    bytes.extend_from_slice(b"\r\n");
    bytes
}

struct Layout {
    style: Style,
    depth: usize,
}

impl Layout {
    fn new(style: Style) -> Self {
        Self { style, depth: 0 }
    }

    fn line<W: io::Write + ?Sized>(&self, out: &mut W) -> io::Result<()> {
        if self.style == Style::Pretty {
            out.write_all(b"\r\n")?;
            for _ in 0..self.depth {
                out.write_all(b"    ")?;
            }
        }
        Ok(())
    }

    fn open<W: io::Write + ?Sized>(&mut self, out: &mut W, bracket: u8) -> io::Result<()> {
        self.depth += 1;
        out.write_all(&[bracket])
    }

    fn close<W: io::Write + ?Sized>(&mut self, out: &mut W, bracket: u8) -> io::Result<()> {
        self.depth -= 1;
        self.line(out)?;
        out.write_all(&[bracket])
    }

    fn separate<W: io::Write + ?Sized>(&self, out: &mut W, first: bool) -> io::Result<()> {
        match (first, self.style) {
            (true, _) => {}
            (false, Style::Compact) => out.write_all(b", ")?,
            (false, Style::Pretty) => out.write_all(b",")?,
        }
        self.line(out)
    }
}

impl Formatter for Layout {
    fn begin_array<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b'[')
    }

    fn end_array<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b']')
    }

    fn begin_array_value<W: io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.separate(out, first)
    }

    fn begin_object<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b'{')
    }

    fn end_object<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b'}')
    }

    fn begin_object_key<W: io::Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.separate(out, first)
    }

    fn begin_object_value<W: io::Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }

    fn write_f64<W: io::Write + ?Sized>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(double(value).as_bytes())
    }

    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        let mut rest = text;
        while let Some(at) = rest.find(|c: char| !(' '..='~').contains(&c)) {
            out.write_all(&rest.as_bytes()[..at])?;
            let Some(character) = rest[at..].chars().next() else { break };
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04X}")?;
            }
            rest = &rest[at + character.len_utf8()..];
        }
        out.write_all(rest.as_bytes())
    }

    fn write_char_escape<W: io::Write + ?Sized>(
        &mut self,
        out: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        let letter = match escape {
            CharEscape::Quote => b'"',
            CharEscape::ReverseSolidus => b'\\',
            CharEscape::Solidus => b'/',
            CharEscape::Backspace => b'b',
            CharEscape::FormFeed => b'f',
            CharEscape::LineFeed => b'n',
            CharEscape::CarriageReturn => b'r',
            CharEscape::Tab => b't',
            CharEscape::AsciiControl(byte) => return write!(out, "\\u{byte:04X}"),
        };
        out.write_all(&[b'\\', letter])
    }
}

/// `value` as C's `%.17g` writes it, which reads back as the same double.
fn double(value: f64) -> String {
    const DIGITS: i32 = 17;
    let scientific = format!("{value:.16e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..DIGITS).contains(&exponent) {
        // At most 20 decimals, so the cast is exact.
        let fixed = format!("{value:.*}", (DIGITS - 1 - exponent) as usize);
        return without_trailing_zeros(&fixed).to_owned();
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", without_trailing_zeros(mantissa), exponent.unsigned_abs())
}

fn without_trailing_zeros(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}
