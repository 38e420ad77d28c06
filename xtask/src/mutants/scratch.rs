//! The copy of the tree that holds the mutants.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::Mutant;
use super::list::BINARIES;
use crate::tree;

/// What tells, in the copy, which mutant runs.
const SWITCH: &str = r#"
/// Whether this is the mistake that is to be made.
pub fn mutant(name: &str) -> bool {
    static CHOSEN: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    CHOSEN.get_or_init(|| std::env::var("HEADWATER_MUTANT").unwrap_or_default()) == name
}
"#;

/// Where the switch goes.
const BLOCK: &str = "crates/headwater-block/src/";

/// The copy, built.
pub(crate) struct Scratch {
    root: PathBuf,
    /// The tests' programs by name.
    binaries: BTreeMap<String, PathBuf>,
}

impl Scratch {
    /// Copies the tree, puts the mutants in, and builds their tests.
    pub(crate) fn prepare(mutants: impl Iterator<Item = &'static Mutant>) -> Result<Self> {
        let root = tree::root().join("target/mutants");
        let mut files = read()?;
        for mutant in mutants {
            for edit in mutant.edits {
                let switch = if edit.file.starts_with(BLOCK) { "crate" } else { "headwater_block" };
                let to = edit.to.replace("MUTANT", &format!("{switch}::mutant({:?})", mutant.name));
                let text = files.get_mut(edit.file).with_context(|| format!("{} is gone", edit.file))?;
                if text.matches(edit.from).count() != 1 {
                    bail!(
                        "{}: the text that the mutant `{}` changes is there {} times, not once; bring xtask/src/mutants up to date:\n{}",
                        edit.file,
                        mutant.name,
                        text.matches(edit.from).count(),
                        edit.from
                    );
                }
                *text = text.replacen(edit.from, &to, 1);
            }
        }
        let lib = files.get_mut(&format!("{BLOCK}lib.rs")).context("headwater-block has a lib.rs")?;
        lib.push_str(SWITCH);
        write(&root, &files)?;
        let binaries = build(&root)?;
        Ok(Self { root, binaries })
    }

    /// The program with a crate's tests.
    pub(crate) fn binary(&self, name: &str) -> Result<&Path> {
        self.binaries
            .get(name)
            .map(PathBuf::as_path)
            .with_context(|| format!("the test {name} was not built"))
    }

    /// Where it expects to run.
    pub(crate) fn directory_of(&self, name: &str) -> Result<PathBuf> {
        let (package, _) = BINARIES.iter().find(|(_, test)| *test == name).context("it is listed")?;
        Ok(self.root.join("crates").join(package))
    }
}

/// What the copy consists of, by path.
fn read() -> Result<BTreeMap<String, String>> {
    let files = tree::read()?.into_iter().filter(|file| {
        let top = ["Cargo.toml", "clippy.toml"].contains(&file.path.as_str());
        // All members of the workspace, whether they are built or not.
        top || ["crates/", "fuzz/", "xtask/"].iter().any(|folder| file.path.starts_with(folder))
    });
    let mut files: BTreeMap<String, String> = files.map(|file| (file.path, file.text)).collect();
    let lock = fs::read_to_string(tree::root().join("Cargo.lock")).context("cannot read Cargo.lock")?;
    files.insert("Cargo.lock".to_owned(), lock);
    Ok(files)
}

/// Brings the copy up to date. What hasn't changed keeps its time, so that it isn't built again.
fn write(root: &Path, files: &BTreeMap<String, String>) -> Result<()> {
    for (path, text) in files {
        let path = root.join(path);
        if fs::read_to_string(&path).is_ok_and(|old| old == *text) {
            continue;
        }
        let parent = path.parent().context("files lie in the copy")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    remove_others(root, root, files)
}

fn remove_others(root: &Path, dir: &Path, files: &BTreeMap<String, String>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_others(root, &path, files)?;
        } else if !files.contains_key(path.strip_prefix(root)?.to_string_lossy().as_ref()) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Builds the tests, beside what the tree itself is built to: cargo would take the one for the other.
fn build(root: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--message-format=json-render-diagnostics"]).current_dir(root);
    for (package, test) in BINARIES {
        cargo.args(["--package", package, "--test", test]);
    }
    let out = cargo
        .env("CARGO_TARGET_DIR", tree::root().join("target/mutants-build"))
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !out.status.success() {
        bail!("the tree with its mutants doesn't build");
    }
    let mut binaries = BTreeMap::new();
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("cargo prints JSON")?;
        if let (Some(name), Some(path)) = (message["target"]["name"].as_str(), message["executable"].as_str())
        {
            binaries.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(binaries)
}
