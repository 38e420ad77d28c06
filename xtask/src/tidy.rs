//! `cargo xtask tidy`: the habits that no compiler lint checks.
//!
//! | module      | what it holds                                                                        |
//! |-------------|--------------------------------------------------------------------------------------|
//! | `edges`     | crate dependencies are exactly those that ARCHITECTURE.md lists                        |
//! | `absences`  | what some part of the tree must never mention (a clock, a format, `unsafe`)            |
//! | `marks`     | every race mark in the source has a test that says it hits it, and the other way       |
//! | `lengths`   | no file beyond the limit, but for recorded ones, which may only shrink                  |
//! | `leftovers` | no unfinished work, no path of somebody's machine; each module begins with its purpose |

mod absences;
mod edges;
mod leftovers;
mod lengths;
mod marks;

use anyhow::Result;

use crate::tree;

/// Runs every check and returns what is wrong, one line each, `path:line: what and what to do`.
pub(crate) fn run(ratchet: bool) -> Result<Vec<String>> {
    let files = tree::read()?;
    let mut problems = leftovers::check(&files);
    problems.extend(absences::check(&files));
    problems.extend(marks::check(&files));
    problems.extend(edges::check(&files)?);
    problems.extend(lengths::check(&files, ratchet)?);
    Ok(problems)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_tree_is_tidy() {
        let problems = super::run(false).expect("tidy runs");
        assert!(problems.is_empty(), "cargo xtask tidy finds:\n{}", problems.join("\n"));
    }
}
