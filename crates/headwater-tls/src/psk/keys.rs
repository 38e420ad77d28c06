//! The file of keys: a user and a key a line.

use headwater_block::{Error, ErrorKind, Result};
use std::collections::HashSet;
use std::fs;
use std::path::Path;

/// The shortest key that is taken, in bytes: what RFC 9257 demands. `psktool` makes 32.
const MIN_KEY: usize = 16;

/// The longest name of a user, in bytes; the longest key, too.
const MAX: usize = 1 << 10;

/// A user and the key that proves who it is.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: Vec<u8>,
    pub(crate) key: Vec<u8>,
}

/// Reads all users of a file, each of whom is in it once.
///
/// # Errors
/// What the system says; `InvalidInput` if a line isn't what it should be. Errors tell no keys.
pub(crate) fn read(path: &Path) -> Result<Vec<User>> {
    let text = fs::read(path).map_err(|e| Error::from_io(e, format_args!("read {}", path.display())))?;
    parse(&text).map_err(|(line, why)| {
        Error::new(
            ErrorKind::InvalidInput,
            format!("{}:{line}: {why}; a line is USER:KEY, the key in hexadecimal digits", path.display()),
        )
    })
}

/// Reads lines; gives the number of one that is wrong, and why.
fn parse(text: &[u8]) -> Result<Vec<User>, (usize, String)> {
    let mut users = Vec::new();
    let mut names = HashSet::new();
    for (line, number) in text.split(|byte| *byte == b'\n').zip(1..) {
        let line = line.trim_ascii_end();
        if line.is_empty() {
            continue;
        }
        let user = parse_line(line).map_err(|why| (number, why))?;
        if !names.insert(user.name.clone()) {
            let name = String::from_utf8_lossy(&user.name).into_owned();
            return Err((number, format!("the user {name:?} has a key already")));
        }
        users.push(user);
    }
    Ok(users)
}

fn parse_line(line: &[u8]) -> Result<User, String> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or("no colon")?;
    let (name, key) = (&line[..colon], &line[colon + 1..]);
    // A name that wouldn't fit into a line is in digits behind a hash sign.
    let name = match name.strip_prefix(b"#") {
        Some(digits) => bytes(digits).ok_or("the name behind # is not in hexadecimal digits")?,
        None => name.to_vec(),
    };
    if name.is_empty() || name.len() > MAX {
        return Err(format!("the name has {} bytes, and may have 1 to {MAX}", name.len()));
    }
    let key = bytes(key).ok_or("the key is not in hexadecimal digits, two a byte")?;
    if !(MIN_KEY..=MAX).contains(&key.len()) {
        return Err(format!("the key has {} bytes, and must have {MIN_KEY} to {MAX}", key.len()));
    }
    Ok(User { name, key })
}

fn bytes(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let (pairs, rest) = digits.as_chunks::<2>();
    // Two digits make at most 255.
    let bytes = pairs.iter().map(|[high, low]| Some((digit(high)? * 16 + digit(low)?) as u8)).collect();
    if rest.is_empty() { bytes } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0f";

    #[test]
    fn users_are_read_with_their_keys() {
        let text = format!("alice:{KEY}\n\n#626f620a:{}ff\r\nc d:{KEY}", KEY.to_uppercase());
        let users = parse(text.as_bytes()).unwrap();
        let key: Vec<u8> = (0..16).collect();
        let names: Vec<&[u8]> = users.iter().map(|user| &user.name[..]).collect();
        assert_eq!(names, [&b"alice"[..], b"bob\n", b"c d"]);
        assert_eq!(users[0].key, key);
        assert_eq!(users[1].key, [&key[..], &[0xff]].concat());
        assert!(parse(b"").unwrap().is_empty());
    }

    #[test]
    fn a_wrong_line_is_named_and_no_key_told() {
        for (line, words) in [
            (KEY.to_owned(), "no colon"),
            (format!(":{KEY}"), "0 bytes"),
            (format!("{}:{KEY}", "x".repeat(1025)), "1025 bytes"),
            (format!("#6x:{KEY}"), "behind #"),
            (format!("bob:{KEY}0"), "two a byte"),
            (format!("bob: {KEY}"), "two a byte"),
            ("bob:0001".to_owned(), "2 bytes"),
            (format!("bob:{}", "00".repeat(1025)), "1025 bytes"),
            (format!("alice:{KEY}"), "a key already"),
        ] {
            let (number, why) = parse(format!("alice:{KEY}\n{line}\n").as_bytes()).err().unwrap();
            assert_eq!(number, 2, "{line}");
            assert!(why.contains(words) && !why.contains(&KEY[..8]), "{line}: {why}");
        }
    }
}
