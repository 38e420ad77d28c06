//! Unfinished work, paths of one machine, and modules without a first word on what they are for.

use crate::tree::File;

/// Marks of unfinished work in Rust code. Written in halves so that this file doesn't accuse itself.
const UNFINISHED: [&str; 8] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("dbg", "!("),
    concat!("todo", "!("),
    concat!("unimplemented", "!("),
    concat!("allow(dead", "_code"),
    concat!("allow(un", "used"),
];

/// Directories that exist on one machine only.
const MACHINE: [&str; 4] =
    [concat!("/wo", "rk/"), concat!("/fa", "rm/"), concat!("/tmp/", "hw"), concat!("/root", "/")];

pub(crate) fn check(files: &[File]) -> Vec<String> {
    let mut problems = Vec::new();
    for file in files {
        if file.is_rust() && !starts_with_purpose(&file.text) {
            problems.push(format!("{}:1: begin the module with //! and say what it is for", file.path));
        }
        for (index, line) in file.text.lines().enumerate() {
            let at = format!("{}:{}", file.path, index + 1);
            if file.is_rust() || file.path.ends_with(".py") || file.path.starts_with("scripts/") {
                // A module that several test binaries share is used by each in part, and says so.
                let excused = file.is_test() && line.contains("allow(") && line.contains("reason = ");
                for word in UNFINISHED.iter().filter(|word| !excused && has_word(line, word)) {
                    problems.push(format!("{at}: {word} left over; finish it or take it out"));
                }
            }
            for path in MACHINE.iter().filter(|path| line.contains(**path)) {
                problems.push(format!("{at}: {path} exists on one machine only; use a relative path"));
            }
        }
    }
    problems
}

/// Inner attributes may stand before the first `//!`, nothing else.
fn starts_with_purpose(text: &str) -> bool {
    text.lines()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with("#![") && !line.starts_with("#!/"))
        .is_some_and(|line| line.starts_with("//! ") && line.len() > 8)
}

/// Whether `word` stands in the line and isn't the middle of a longer name.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let part_of_name = |c: char| c.is_alphanumeric() || c == '_';
        let before = line[..at].chars().next_back().is_some_and(part_of_name);
        let after = line[at + word.len()..].chars().next().is_some_and(part_of_name);
        !(before || after && word.ends_with(char::is_alphanumeric))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> usize {
        check(&[File { path: path.into(), text: text.into() }]).len()
    }

    #[test]
    fn finds_what_it_should() {
        assert_eq!(problems("a.rs", "//! What this is for.\nfn f() {}\n"), 0);
        assert_eq!(problems("a.rs", "fn f() {}\n"), 1);
        assert_eq!(problems("a.rs", &format!("//! What this is for.\n// {}: later\n", UNFINISHED[0])), 1);
        assert_eq!(problems("a.rs", &format!("//! What this is for.\nfn f() {{ {}) }}\n", UNFINISHED[4])), 1);
        assert_eq!(problems("a.md", &format!("see {}x\n", MACHINE[0])), 1);
        assert_eq!(problems("a.rs", "//! What this is for.\nconst XXXL: u8 = 1;\n"), 0);
    }
}
