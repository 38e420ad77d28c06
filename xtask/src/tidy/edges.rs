//! Crate edges: the dependencies between workspace crates are exactly those that ARCHITECTURE.md lists.
//!
//! The list is the fenced block ```` ```crate-edges ```` with one `crate -> crate crate ...` in a row. Dev-dependencies
//! are free: a test may join what the code keeps apart.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::metadata;
use crate::tree::File;

type Edges = BTreeMap<String, BTreeSet<String>>;

const DOCUMENT: &str = "ARCHITECTURE.md";

pub(crate) fn check(files: &[File]) -> Result<Vec<String>> {
    let document = files.iter().find(|file| file.path == DOCUMENT).context("there is no ARCHITECTURE.md")?;
    let listed = listed(&document.text)?;
    Ok(compare(&listed, &actual(&metadata::read()?)))
}

fn listed(document: &str) -> Result<Edges> {
    let (_, rest) =
        document.split_once("```crate-edges\n").context("ARCHITECTURE.md has no crate-edges block")?;
    let (block, _) = rest.split_once("```").context("the crate-edges block of ARCHITECTURE.md has no end")?;
    let rows = block.lines().filter(|line| !line.trim().is_empty());
    rows.map(|row| {
        let (from, to) =
            row.split_once("->").with_context(|| format!("`{row}` is no `crate -> crate ...`"))?;
        Ok((from.trim().to_owned(), to.split_whitespace().map(str::to_owned).collect()))
    })
    .collect()
}

fn actual(metadata: &Value) -> Edges {
    let names: BTreeSet<&str> = metadata::packages(metadata).map(|p| metadata::text(p, "name")).collect();
    let edges_of = |package: &Value| {
        let all = package["dependencies"].as_array().into_iter().flatten();
        let normal = all.filter(|dependency| dependency["kind"].as_str() != Some("dev"));
        let inside =
            normal.map(|dependency| metadata::text(dependency, "name")).filter(|name| names.contains(name));
        inside.map(str::to_owned).collect()
    };
    metadata::packages(metadata).map(|p| (metadata::text(p, "name").to_owned(), edges_of(p))).collect()
}

fn compare(listed: &Edges, actual: &Edges) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, edges) in actual {
        let Some(allowed) = listed.get(name) else {
            problems.push(format!("{DOCUMENT}: crate {name} is not in the crate-edges block"));
            continue;
        };
        for to in edges.difference(allowed) {
            problems.push(format!("{name}/Cargo.toml: depends on {to}, which {DOCUMENT} doesn't list"));
        }
        for to in allowed.difference(edges) {
            problems.push(format!("{DOCUMENT}: lists {name} -> {to}, which is no dependency"));
        }
    }
    for name in listed.keys().filter(|name| !actual.contains_key(*name)) {
        problems.push(format!("{DOCUMENT}: lists crate {name}, which doesn't exist"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_told() {
        let listed = listed("text\n```crate-edges\na ->\nb -> a\nc -> a b\ngone ->\n```\n").expect("parses");
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let actual = Edges::from([
            ("a".into(), set(&[])),
            ("b".into(), set(&["a", "c"])),
            ("c".into(), set(&["a"])),
            ("d".into(), set(&[])),
        ]);
        assert_eq!(compare(&listed, &actual).len(), 4);
    }
}
