//! `headwater man [DIR]`.

use crate::failure::{Failure, Outcome};
use clap::Args;
use std::path::PathBuf;

/// Arguments of `man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Where to write the pages, one for each verb; without it the first page is printed.
    pub directory: Option<PathBuf>,
}

/// Prints the first page or writes all of them.
///
/// # Errors
/// If a page can't be written.
pub fn run(args: ManArgs) -> Outcome {
    let command = super::command();
    match args.directory {
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page).map_err(Failure::new)?;
            crate::output::print(&page)
        }
        Some(directory) => std::fs::create_dir_all(&directory)
            .and_then(|()| clap_mangen::generate_to(command, &directory))
            .map_err(|err| Failure::new(format!("cannot write pages into {}: {err}", directory.display()))),
    }
}
