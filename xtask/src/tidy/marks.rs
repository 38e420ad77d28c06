//! Race marks: each window in which two operations can meet is marked where it is open, and one test says it hits it.
//!
//! In the source, `// race-mark: some-name`; in a test, `// race-test: some-name`.

use std::collections::BTreeMap;

use crate::tree::File;

const MARK: &str = "// race-mark: ";
const TEST: &str = "// race-test: ";

pub(crate) fn check(files: &[File]) -> Vec<String> {
    let (marks, mut problems) = places(files, MARK);
    let (tests, more) = places(files, TEST);
    problems.extend(more);
    for (name, at) in &marks {
        if at.len() > 1 {
            problems.push(format!("{}: race mark {name} stands also at {}; name them apart", at[1], at[0]));
        }
        if !tests.contains_key(name) {
            problems.push(format!("{}: no test hits race mark {name}; write one with `{TEST}{name}`", at[0]));
        }
    }
    for (name, at) in tests.iter().filter(|(name, _)| !marks.contains_key(*name)) {
        problems
            .push(format!("{}: race test of {name}, which no source line marks with `{MARK}{name}`", at[0]));
    }
    problems
}

/// Every `prefix name` in Rust files, by name, with the places; and complaints about names of the wrong form.
fn places(files: &[File], prefix: &str) -> (BTreeMap<String, Vec<String>>, Vec<String>) {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut problems = Vec::new();
    for file in files.iter().filter(|file| file.is_rust() && !file.path.starts_with("xtask/")) {
        for (index, line) in file.text.lines().enumerate() {
            let Some(name) = line.trim_start().strip_prefix(prefix) else { continue };
            let at = format!("{}:{}", file.path, index + 1);
            if name.is_empty()
                || !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            {
                problems.push(format!("{at}: name `{name}` must be lower case words joined by -"));
            } else {
                found.entry(name.to_owned()).or_default().push(at);
            }
        }
    }
    (found, problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(src: &str, test: &str) -> usize {
        let file = |path: &str, text: &str| File { path: path.into(), text: text.into() };
        check(&[file("crates/a/src/b.rs", src), file("crates/a/src/b/tests.rs", test)]).len()
    }

    #[test]
    fn marks_and_tests_pair_up() {
        assert_eq!(problems("// race-mark: a-b\n", "    // race-test: a-b\n"), 0);
        assert_eq!(problems("// race-mark: a-b\n", ""), 1);
        assert_eq!(problems("", "// race-test: a-b\n"), 1);
        assert_eq!(problems("// race-mark: a-b\n// race-mark: a-b\n", "// race-test: a-b\n"), 1);
        assert_eq!(problems("// race-mark: A b\n", ""), 1);
    }
}
