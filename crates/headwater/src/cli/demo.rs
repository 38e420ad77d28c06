//! `headwater demo`.

use crate::failure::Outcome;
use crate::size::parse_size;
use clap::Args;

/// Arguments of `demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// The size of the source that is made for it, in a temporary directory.
    #[arg(long, default_value = "256M", value_parser = parse_size)]
    pub size: u64,
    /// How far away the source is, in milliseconds for each request.
    #[arg(long, value_name = "MS", default_value_t = 50)]
    pub latency: u64,
    /// What the source and the clients' work depend on.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Runs the demonstration.
///
/// # Errors
/// The first thing that isn't as it must be.
pub fn run(args: DemoArgs) -> Outcome {
    crate::demo::run(args)
}
