//! Checks of the source tree itself: `cargo xtask tidy`, which is also a test of this crate, and of its tests: `cargo xtask mutants`.

mod metadata;
mod mutants;
mod tidy;
mod tree;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <check>
  tidy           module heads, crate edges, absences, race marks, file lengths, left-overs
  tidy --ratchet the same, and lower the recorded lengths of files that shrank
  mutants [NAME] deliberate mistakes, all or those whose names contain NAME: some test must notice each";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let outcome = match args.as_slice() {
        ["tidy"] => tidy::run(false),
        ["tidy", "--ratchet"] => tidy::run(true),
        ["mutants"] => mutants::run(None),
        ["mutants", name] => mutants::run(Some(name)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(problems) if problems.is_empty() => ExitCode::SUCCESS,
        Ok(problems) => {
            for problem in &problems {
                eprintln!("{problem}");
            }
            eprintln!("{}: {} problem(s)", args[0], problems.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{}: could not run: {error:#}", args[0]);
            ExitCode::FAILURE
        }
    }
}
