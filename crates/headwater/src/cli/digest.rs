//! `headwater digest IMAGE`.

use super::OpenArgs;
use crate::failure::Outcome;
use crate::size::parse_size;
use clap::Args;
use std::path::PathBuf;

/// Arguments of `digest`.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = AFTER)]
pub struct DigestArgs {
    /// The image: a file, or behind nbd://, nbd+unix://, nbds:// (TLS), http:// or https://.
    #[arg(value_parser = crate::source::parse)]
    pub image: String,
    /// Where the manifest is written; without it, to standard output.
    #[arg(short, long, value_name = "MANIFEST")]
    pub output: Option<PathBuf>,
    /// How many bytes each hash is of: a power of two from 4K to 16M. Without it 256K, more for images above 1 TiB.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub chunk_size: Option<u64>,
    /// For how many seconds a request to a remote image that is out of reach is tried again.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub retry: u32,
    /// For how many seconds a remote server may send nothing while it is to send something; then the request is made again.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub timeout: u32,
    /// How files are opened.
    #[command(flatten)]
    pub open: OpenArgs,
}

const AFTER: &str = "\
The hashes are of the image's file as it lies there, whatever its format; so what `--verify` checks is what a source sends. Sign the manifest, or keep its \
root, to know later that it is the same.";

/// Makes a manifest.
///
/// # Errors
/// If the image can't be read, or the manifest not be written.
pub fn run(args: DigestArgs) -> Outcome {
    crate::digest::run(args)
}
