//! What is fuzzed: functions that take any bytes whatever and must hold their promises.
//!
//! - [`Target`], [`TARGETS`]: the functions, with the inputs that fuzzing starts from. How each input is read stands at the top of its
//!   module in [`targets`].
//! - [`entry!`]: a target as a program, for cargo-fuzz or, without it, to run inputs again.
//! - [`mutate`]: changes inputs at random, for where there is no libFuzzer: the tests run every target on what it starts from, on what was
//!   once found, and on some hundred changes of these.
//!
//! A target panics if a promise is broken. Beyond "no input panics" each says what it asserts. README.md says how to run them.

#![forbid(unsafe_code)]

mod capped;
pub mod mutate;
pub mod targets;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

/// Something that is fuzzed.
pub struct Target {
    /// The name of its program.
    pub name: &'static str,
    /// Tries one input; panics if a promise is broken.
    pub run: fn(&[u8]),
    /// The inputs that fuzzing starts from.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// The longest input that is worth trying, in bytes.
    pub max_len: usize,
}

/// All targets, in the order of their names.
pub const TARGETS: &[Target] = &[
    targets::http::TARGET,
    targets::manifest::TARGET,
    targets::names::TARGET,
    targets::nbd_client::TARGET,
    targets::nbd_codec::TARGET,
    targets::nbd_server::TARGET,
    targets::options::TARGET,
    targets::qcow2_header::TARGET,
    targets::qcow2_image::TARGET,
    targets::qcow2_io::TARGET,
    targets::qmp::TARGET,
    targets::tls::TARGET,
    targets::vhost_user::TARGET,
];

/// The target called `name`.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

impl Target {
    /// Where inputs that once broke a promise are kept.
    pub fn regressions(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions").join(self.name)
    }

    /// The seeds, and what is in [`Target::regressions`], each with a name.
    ///
    /// # Errors
    /// If a file can't be read.
    pub fn inputs(&self) -> std::io::Result<Vec<(String, Vec<u8>)>> {
        let seeds = (self.seeds)().into_iter().enumerate();
        let mut all: Vec<_> = seeds.map(|(i, seed)| (format!("seed-{i:03}"), seed)).collect();
        let directory = self.regressions();
        if directory.exists() {
            let mut files: Vec<_> = std::fs::read_dir(directory)?.collect::<Result<_, _>>()?;
            files.sort_by_key(std::fs::DirEntry::path);
            for file in files {
                all.push((file.file_name().to_string_lossy().into_owned(), std::fs::read(file.path())?));
            }
        }
        Ok(all)
    }
}

/// Makes a program of a target: what cargo-fuzz runs, and without it what runs the files that are named as arguments.
#[macro_export]
macro_rules! entry {
    ($name:ident) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|data: &[u8]| ($crate::targets::$name::TARGET.run)(data));

        #[cfg(not(fuzzing))]
        fn main() -> std::io::Result<()> {
            for file in std::env::args().skip(1) {
                ($crate::targets::$name::TARGET.run)(&std::fs::read(file)?);
            }
            Ok(())
        }
    };
}
