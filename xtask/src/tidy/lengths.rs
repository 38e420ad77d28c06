//! A ratchet on file length: a Rust file has one subject and at most `LIMIT` lines.
//!
//! Longer files are recorded with their length in `xtask/long-files.txt`. They may not grow, and a record that has
//! become too large must be lowered (`cargo xtask tidy --ratchet` does it), so that the list only ever shrinks.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

use crate::tree::{self, File};

/// Lines that a file may have without being recorded.
const LIMIT: usize = 500;

/// Where the exceptions are recorded, one `lines path` in a row.
const RECORD: &str = "xtask/long-files.txt";

const HEAD: &str = "\
# Files longer than the limit, with the length that they may not exceed. Split them; never add to this list lightly.
";

pub(crate) fn check(files: &[File], ratchet: bool) -> Result<Vec<String>> {
    let path = tree::root().join(RECORD);
    let recorded = parse(&fs::read_to_string(&path).with_context(|| format!("cannot read {RECORD}"))?)?;
    let lengths: BTreeMap<&str, usize> =
        files.iter().filter(|file| file.is_rust()).map(|file| (file.path.as_str(), lines(file))).collect();
    if !ratchet {
        return Ok(compare(&recorded, &lengths));
    }
    let lowered = lower(&recorded, &lengths);
    let mut text = HEAD.to_owned();
    for (path, length) in &lowered {
        text.push_str(&format!("{length} {path}\n"));
    }
    fs::write(&path, text).with_context(|| format!("cannot write {RECORD}"))?;
    Ok(compare(&lowered, &lengths))
}

fn lines(file: &File) -> usize {
    file.text.lines().count()
}

fn parse(text: &str) -> Result<BTreeMap<String, usize>> {
    let rows = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    rows.map(|row| {
        let (length, path) =
            row.split_once(' ').with_context(|| format!("{RECORD}: `{row}` is no `lines path`"))?;
        Ok((path.to_owned(), length.parse().with_context(|| format!("{RECORD}: `{length}` is no number"))?))
    })
    .collect()
}

fn compare(recorded: &BTreeMap<String, usize>, lengths: &BTreeMap<&str, usize>) -> Vec<String> {
    let mut problems = Vec::new();
    for (&path, &length) in lengths {
        match recorded.get(path) {
            None if length > LIMIT => {
                problems.push(format!("{path}: {length} lines, the limit is {LIMIT}; split it by subject"));
            }
            Some(&allowed) if length > allowed => {
                problems.push(format!("{path}: grew to {length} lines from {allowed}; split it by subject"));
            }
            Some(&allowed) if length < allowed => problems.push(format!(
                "{RECORD}: {path} shrank to {length} from {allowed}; run `cargo xtask tidy --ratchet`"
            )),
            _ => {}
        }
    }
    for path in recorded.keys().filter(|path| !lengths.contains_key(path.as_str())) {
        problems.push(format!("{RECORD}: {path} is gone; run `cargo xtask tidy --ratchet`"));
    }
    problems
}

/// The record with nothing in it that is gone, short enough by now, or higher than the file.
fn lower(recorded: &BTreeMap<String, usize>, lengths: &BTreeMap<&str, usize>) -> BTreeMap<String, usize> {
    let rows = recorded.iter().filter_map(|(path, &allowed)| {
        let length = allowed.min(*lengths.get(path.as_str())?);
        (length > LIMIT).then(|| (path.clone(), length))
    });
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratchet_only_turns_one_way() {
        let recorded = parse("# head\n600 a.rs\n700 b.rs\n800 gone.rs\n").expect("parses");
        let lengths = BTreeMap::from([("a.rs", 601), ("b.rs", 650), ("c.rs", 501), ("d.rs", 500)]);
        assert_eq!(compare(&recorded, &lengths).len(), 4);
        let lowered = lower(&recorded, &lengths);
        assert_eq!(lowered, BTreeMap::from([("a.rs".to_owned(), 600), ("b.rs".to_owned(), 650)]));
        assert_eq!(compare(&lowered, &lengths).len(), 2);
    }
}
