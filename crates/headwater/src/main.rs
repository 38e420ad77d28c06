//! The headwater command: everything is in the library, so that tests and the demonstration run the same code.

use std::process::ExitCode;

fn main() -> ExitCode {
    headwater::cli::main()
}
