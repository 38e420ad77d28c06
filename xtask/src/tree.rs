//! The files of the project as the checks see them: text files that belong to the repository.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Ends of file names that the checks read.
const KINDS: [&str; 9] = [".rs", ".toml", ".md", ".py", ".sh", ".yml", ".yaml", "/run", ".txt"];

/// One text file of the project.
pub(crate) struct File {
    /// Path from the root of the project, with `/` between its parts.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl File {
    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether the whole file is test code: a `tests/` directory, `foo/tests.rs` or a file below `foo/tests/`, a bench.
    pub(crate) fn is_test(&self) -> bool {
        self.path.ends_with("/tests.rs")
            || self.path.split('/').any(|part| part == "tests" || part == "benches")
            || self.path.starts_with("crates/headwater-sim/")
            || self.path.starts_with("crates/headwater-faults/")
            || self.path.starts_with("crates/headwater-front-end/")
    }

    /// Lines with their numbers (from 1), up to an inline `mod tests {` at the end of the file.
    pub(crate) fn code_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let end = self.text.find("\nmod tests {").unwrap_or(self.text.len());
        self.text[..end].lines().enumerate().map(|(index, line)| (index + 1, strip_comment(line)))
    }
}

/// The line without a trailing `//` comment. A `//` inside a string literal (a URI) is kept.
fn strip_comment(line: &str) -> &str {
    let mut quoted = false;
    let bytes = line.as_bytes();
    for (at, &byte) in bytes.iter().enumerate() {
        match byte {
            b'"' if at == 0 || bytes[at - 1] != b'\\' => quoted = !quoted,
            b'/' if !quoted && bytes.get(at + 1) == Some(&b'/') => return &line[..at],
            _ => {}
        }
    }
    line
}

/// The project's root directory.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root").to_path_buf()
}

/// Every text file of the project, sorted by path.
pub(crate) fn read() -> Result<Vec<File>> {
    let root = root();
    let mut files = Vec::new();
    collect(&root, &root, &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn collect(root: &Path, dir: &Path, files: &mut Vec<File>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        let path = entry.path();
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if !["target", ".git"].contains(&name.as_str()) {
                collect(root, &path, files)?;
            }
        } else if kind.is_file() && belongs(&name) {
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {name} as text"))?;
            files.push(File { path: name, text });
        }
    }
    Ok(())
}

fn belongs(name: &str) -> bool {
    KINDS.iter().any(|kind| name.ends_with(kind)) || name.starts_with("scripts/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_end_code_but_uris_do_not() {
        assert_eq!(strip_comment("let a = 1; // why"), "let a = 1; ");
        assert_eq!(strip_comment(r#"open("nbd://host/x"); // why"#), r#"open("nbd://host/x"); "#);
    }
}
