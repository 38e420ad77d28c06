//! Lists targets, writes the inputs that fuzzing starts from, and runs inputs again, without libFuzzer.

use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "\
usage: replay list                     names of the targets, and the longest input that each takes
       replay seeds TARGET DIRECTORY   writes what fuzzing of TARGET starts from
       replay run TARGET FILE...       runs inputs; panics where fuzzing did";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["list"] => {
            for target in headwater_fuzz::TARGETS {
                println!("{} {}", target.name, target.max_len);
            }
            Ok(())
        }
        ["seeds", name, directory] => with(name, |target| {
            std::fs::create_dir_all(directory)?;
            for (input, bytes) in target.inputs()? {
                std::fs::write(Path::new(directory).join(input), bytes)?;
            }
            Ok(())
        }),
        ["run", name, files @ ..] => with(name, |target| {
            for file in files {
                println!("{file}");
                (target.run)(&std::fs::read(file)?);
            }
            Ok(())
        }),
        _ => Err(USAGE.to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn with(name: &str, action: impl Fn(&headwater_fuzz::Target) -> std::io::Result<()>) -> Result<(), String> {
    let target = headwater_fuzz::target(name).ok_or_else(|| format!("there is no target {name}\n{USAGE}"))?;
    action(target).map_err(|error| format!("{name}: {error}"))
}
