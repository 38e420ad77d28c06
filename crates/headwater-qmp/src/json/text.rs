//! The value of a string token.
//!
//! Stricter than UTF-8 in refusing code points that are no characters (U+FFFE, U+FDD0 and the like), and laxer in taking
//! the two-byte form of U+0000.

use super::SyntaxError;

/// What stands between the quotes of `token`, with its escapes undone.
pub(super) fn unquote(token: &[u8]) -> Result<String, SyntaxError> {
    let body = token.get(1..token.len().saturating_sub(1)).unwrap_or_default();
    let mut text = String::with_capacity(body.len());
    let mut at = 0;
    while let Some(&byte) = body.get(at) {
        match byte {
            b'\\' => {
                // An escape that lacks digits is shown with what follows it, be it the closing quote.
                let (character, length) = escape(token.get(at + 1..).unwrap_or_default())?;
                text.push(character);
                at += length;
            }
            0x20..=0x7f => {
                text.push(char::from(byte));
                at += 1;
            }
            _ => {
                let (character, length) = character(&body[at..]);
                text.push(character.ok_or_else(|| SyntaxError::parse("invalid UTF-8 sequence in string"))?);
                at += length;
            }
        }
    }
    Ok(text)
}

/// The character that an escape stands for, and how many bytes the escape has. `bytes` begins with its backslash.
fn escape(bytes: &[u8]) -> Result<(char, usize), SyntaxError> {
    let simple = match bytes.get(1) {
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(&c @ (b'"' | b'\'' | b'\\' | b'/')) => char::from(c),
        Some(b'u') => return unicode_escape(bytes),
        _ => return Err(SyntaxError::parse("invalid escape sequence in string")),
    };
    Ok((simple, 2))
}

fn unicode_escape(bytes: &[u8]) -> Result<(char, usize), SyntaxError> {
    const ESCAPE: usize = 6;
    let first = hex(bytes);
    let second = bytes.get(ESCAPE..).filter(|rest| rest.starts_with(b"\\u")).and_then(hex);
    let (code, length) = match (first, second) {
        (Some(high @ 0xd800..=0xdbff), Some(low @ 0xdc00..=0xdfff)) => {
            (Some(0x10000 + ((high & 0x3ff) << 10) + (low & 0x3ff)), 2 * ESCAPE)
        }
        (code, _) => (code, ESCAPE),
    };
    match code.and_then(char::from_u32).filter(|&c| is_character(c)) {
        Some(character) => Ok((character, length)),
        None => {
            let shown = lossy(&bytes[..length.min(bytes.len())]);
            Err(SyntaxError::parse(format!("{shown} is not a valid Unicode character")))
        }
    }
}

/// The four digits after `\u`.
fn hex(bytes: &[u8]) -> Option<u32> {
    bytes.get(2..6)?.iter().try_fold(0, |value, &b| Some(value * 16 + char::from(b).to_digit(16)?))
}

/// The character at the start of `bytes`, if it is one, and how many bytes that is or isn't.
///
/// A sequence has the length that its first byte promises, also where UTF-8 knows none, up to what cannot continue it.
fn character(bytes: &[u8]) -> (Option<char>, usize) {
    let promised = match bytes.first() {
        Some(0xc0..=0xdf) => 2,
        Some(0xe0..=0xef) => 3,
        Some(0xf0..=0xf7) => 4,
        Some(0xf8..=0xfb) => 5,
        Some(0xfc..=0xfd) => 6,
        _ => 1,
    };
    let continued = bytes.iter().skip(1).take_while(|&&b| b & 0xc0 == 0x80).count();
    let length = promised.min(1 + continued);
    match &bytes[..length.min(bytes.len())] {
        [0xc0, 0x80] => (Some('\0'), length),
        sequence => {
            let decoded = std::str::from_utf8(sequence).ok().and_then(|text| text.chars().next());
            (decoded.filter(|&c| is_character(c)), length)
        }
    }
}

/// `bytes` as they are shown in a message: with U+FFFD for each sequence that is no character.
pub(super) fn lossy(mut bytes: &[u8]) -> String {
    let mut shown = String::with_capacity(bytes.len());
    while !bytes.is_empty() {
        let (character, length) = character(bytes);
        shown.push(character.unwrap_or(char::REPLACEMENT_CHARACTER));
        bytes = bytes.get(length..).unwrap_or_default();
    }
    shown
}

/// Unicode sets aside the last two code points of each plane, and 32 more, as "noncharacters".
fn is_character(c: char) -> bool {
    let code = u32::from(c);
    !(0xfdd0..=0xfdef).contains(&code) && code & 0xfffe != 0xfffe
}
