//! The command line, split by verb: each module below holds one verb's arguments and what it does with them.
//!
//! The definitions are the only source of the help, of the manual pages ([`man`]) and of the shells' completions
//! ([`completions`]).

use crate::failure::{Outcome, code};
use crate::output;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use std::io::IsTerminal;
use std::process::ExitCode;

pub mod boot;
pub mod check;
pub mod completions;
pub mod create;
pub mod ctl;
pub mod daemon;
pub mod demo;
pub mod digest;
pub mod info;
pub mod jobs;
pub mod man;
pub mod map;
pub mod reach;
pub mod serve;
pub mod stream;

/// headwater's command line.
#[derive(Debug, Parser)]
#[command(name = "headwater", version, about = "Any image becomes a local disk while it is in use", after_long_help = EXIT_CODES)]
#[command(arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

const EXIT_CODES: &str = "\
Exit codes:
    0  done
    1  failed; the line that begins with 'headwater:' says why and what to do
    2  wrong command line; check: the image has corruptions
    3  check: the image has leaked clusters, but is correct
    4  stream: cancelled through the control socket; the same command resumes
   63  check: an image of this format can't be checked
  130  interrupted (Ctrl-C, SIGTERM); the same command resumes

HEADWATER_LOG=debug shows what happens inside (error, warn, info, debug, trace, or per module).";

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make SOURCE a local disk that is in use from the first second, while its data stream in.
    Stream(stream::StreamArgs),
    /// Start a virtual machine on SOURCE at once, while its data stream into a disk of its own.
    Boot(boot::BootArgs),
    /// Serve an image as it is, without streaming.
    Serve(serve::ServeArgs),
    /// Make an image.
    Create(create::CreateArgs),
    /// Write down what an image's file holds, as hashes that `--verify` checks it by.
    Digest(digest::DigestArgs),
    /// Tell what is known about an image and what it stands on.
    Info(info::InfoArgs),
    /// Show which layer holds which bytes of an image.
    Map(map::MapArgs),
    /// Check an image's structure, and repair it if asked to.
    Check(check::CheckArgs),
    /// Send one command to a running `headwater stream --control PATH`.
    Ctl(ctl::CtlArgs),
    /// Run the storage daemon: qemu-storage-daemon's options and QMP.
    #[command(disable_help_flag = true, after_long_help = crate::daemon::HELP)]
    Daemon(daemon::DaemonArgs),
    /// List, start, pause, limit, cancel and watch the jobs of a running daemon.
    Jobs(jobs::JobsArgs),
    /// Show all of it at work on a source made for the occasion, prove it correct, and clean up.
    Demo(demo::DemoArgs),
    /// Print a completion script for a shell.
    Completions(completions::CompletionsArgs),
    /// Print the manual, or write its pages into a directory.
    Man(man::ManArgs),
}

/// How files are read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Io {
    /// The ring where the kernel allows it, threads otherwise.
    Auto,
    /// io_uring; fails where it is forbidden.
    Ring,
    /// A pool of threads.
    Threads,
}

/// Whether files go through the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Past the page cache where the filesystem can.
    Auto,
    /// Past the page cache (O_DIRECT), or fail.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// An image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// The file's bytes are the disk.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl From<FormatArg> for headwater_image::probe::Format {
    fn from(format: FormatArg) -> Self {
        match format {
            FormatArg::Raw => Self::Raw,
            FormatArg::Qcow2 => Self::Qcow2,
        }
    }
}

/// A switch that may be written without its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// Yes.
    On,
    /// No.
    Off,
}

/// What all verbs that open images take.
#[derive(Debug, Clone, Args)]
pub struct OpenArgs {
    /// How files are read and written.
    #[arg(long, value_enum, default_value_t = Io::Auto, help_heading = "Files")]
    pub io: Io,
    /// Whether files go past the page cache or through it.
    #[arg(long, value_enum, default_value_t = Cache::Auto, help_heading = "Files")]
    pub cache: Cache,
    /// Memory for the cached tables of all images of a chain together (512K, 32M).
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = crate::size::parse_size, help_heading = "Files")]
    pub table_cache: u64,
    /// A name found inside an image that may be opened: a file, a directory with what is below it, or a URI. Without it, only plain
    /// names of files in the image's own directory may. May be given several times.
    #[arg(long, value_name = "PATH", help_heading = "Files")]
    pub allow_backing: Vec<String>,
    /// Find out the format of backing files that don't have it recorded; who could write to such a file chooses what it is read as.
    #[arg(long, help_heading = "Files")]
    pub allow_probed_format: bool,
}

impl Default for OpenArgs {
    fn default() -> Self {
        Self {
            io: Io::Auto,
            cache: Cache::Auto,
            table_cache: headwater_image::open::DEFAULT_CACHE_SIZE,
            allow_backing: Vec::new(),
            allow_probed_format: false,
        }
    }
}

/// Parses the command line, does what it says, and gives the exit code.
pub fn main() -> ExitCode {
    log();
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if std::path::Path::new(&name).file_name().is_some_and(|name| name == crate::daemon::PROGRAM) {
        return end(crate::daemon::run(arguments.collect()), crate::daemon::PROGRAM);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(err) => {
            let _ = err.print();
            return ExitCode::from(if err.use_stderr() { code::USAGE } else { code::OK });
        }
    };
    end(run(cli.verb), "headwater")
}

/// Tells why it failed, if it did, and gives the exit code.
fn end(outcome: Outcome, program: &str) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::from(code::OK),
        Err(failure) => {
            if let Some(message) = &failure.message {
                eprintln!("{program}: {}", output::line(message));
            }
            if let Some(hint) = &failure.hint {
                eprintln!("{}", output::line(hint));
            }
            ExitCode::from(failure.code)
        }
    }
}

fn run(verb: Verb) -> Outcome {
    match verb {
        Verb::Stream(args) => stream::run(args),
        Verb::Boot(args) => boot::run(args),
        Verb::Digest(args) => digest::run(args),
        Verb::Serve(args) => serve::run(args),
        Verb::Create(args) => create::run(args),
        Verb::Info(args) => info::run(args),
        Verb::Map(args) => map::run(args),
        Verb::Check(args) => check::run(args),
        Verb::Ctl(args) => ctl::run(args),
        Verb::Daemon(args) => daemon::run(args),
        Verb::Jobs(args) => jobs::run(args),
        Verb::Demo(args) => demo::run(args),
        Verb::Completions(args) => completions::run(args),
        Verb::Man(args) => man::run(args),
    }
}

/// Messages of the library's inside, to stderr, as HEADWATER_LOG says; and what the daemon's `--trace` switches on.
fn log() {
    use tracing_subscriber::Layer;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    // The crate fuser warns of each kind of request that a file system doesn't have, which is how the kernel gets to know.
    let usual = "warn,fuser=error";
    let wanted = std::env::var("HEADWATER_LOG").ok().filter(|wanted| !wanted.is_empty());
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::WARN.into())
        .parse_lossy(wanted.as_deref().unwrap_or(usual));
    let messages = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .with_filter(filter);
    let traced = tracing_subscriber::filter::Targets::new()
        .with_target(crate::daemon::trace::TARGET, tracing::Level::TRACE);
    tracing_subscriber::registry()
        .with(messages)
        .with(crate::daemon::trace::TraceLayer.with_filter(traced))
        .init();
}

/// The whole command, for those who generate text from it.
fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_definitions_are_sound() {
        super::command().debug_assert();
    }
}
