//! Standard output.

use crate::failure::{Failure, Outcome};
use std::io::Write;

/// Writes `bytes` to standard output. A reader that has gone (`| head`) is no failure.
///
/// # Errors
/// If they can't be written for another reason.
pub fn print(bytes: &[u8]) -> Outcome {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(err) if err.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("cannot write to standard output: {err}")))
        }
        _ => Ok(()),
    }
}

/// `text` such that it stays in its line and moves no cursor: names from images, servers and file systems may hold anything.
pub fn line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => line.push(' '),
            c if c.is_control() => line.extend(c.escape_default()),
            c => line.push(c),
        }
    }
    line
}

/// Writes `value` as JSON, over several lines.
///
/// # Errors
/// As for [`print()`].
pub fn print_json(value: &impl serde::Serialize) -> Outcome {
    let mut text = serde_json::to_vec_pretty(value).map_err(Failure::new)?;
    text.push(b'\n');
    print(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leaves_its_line() {
        assert_eq!(line("a\nb\x1b[2J\u{9b}1m\tä"), "a b\\u{1b}[2J\\u{9b}1m\\tä");
    }
}
