//! `headwater info`: what `qemu-img info` tells, in its names of fields or for people.

use super::{FormatArg, OpenArgs};
use crate::confine::Writes;
use crate::failure::Outcome;
use crate::opener::{Access, Opener};
use crate::output;
use crate::runtime;
use crate::size::human;
use clap::Args;
use headwater_image::info::{FormatSpecific, ImageInfo, Qcow2Info};
use std::fmt::Write;

/// Arguments of `info`.
#[derive(Debug, Clone, Args)]
pub struct InfoArgs {
    /// The image: a file, or behind nbd://, nbd+unix://, nbds:// (TLS), http://, https://, s3://, gs:// or az://.
    #[arg(value_parser = crate::source::parse)]
    pub file: String,
    /// Print JSON with the names of fields that qemu-img uses.
    #[arg(long)]
    pub json: bool,
    /// All images of the chain, from the top down.
    #[arg(long)]
    pub backing_chain: bool,
    /// The image's format; without it, its first bytes tell.
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
    /// How files are opened.
    #[command(flatten)]
    pub open: OpenArgs,
}

/// Says what is known about the image.
///
/// # Errors
/// If it can't be opened. A chain that breaks off further down is told of and is no failure.
pub fn run(args: InfoArgs) -> Outcome {
    Writes::default().confine();
    runtime::run(async move {
        let opener = Opener::new(&args.open)?;
        let chain =
            opener.info(&args.file, args.format.map(Into::into), Access::Look, args.backing_chain).await?;
        if let Some(failure) = &chain.failure {
            let failure = output::line(&failure.to_string());
            eprintln!("headwater: the chain can't be followed further: {failure}");
        }
        if args.json {
            let mut json = chain.json(args.backing_chain);
            json.push(b'\n');
            return output::print(&json);
        }
        let shown = if args.backing_chain { chain.images.len() } else { 1 };
        let texts: Vec<String> = chain.images.iter().take(shown).map(text).collect();
        output::print(texts.join("\n").as_bytes())
    })
}

/// One image for people.
fn text(image: &ImageInfo) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "{:<18}{}", format!("{name}:"), output::line(&value));
    };
    row("image", image.filename.clone());
    row("format", image.format.to_owned());
    row("virtual size", format!("{} ({} bytes)", human(image.virtual_size), image.virtual_size));
    if let Some(size) = image.actual_size {
        row("on disk", human(size));
    }
    if let Some(size) = image.cluster_size {
        row("cluster size", human(size));
    }
    if let Some(backing) = &image.backing_filename {
        let format = image.backing_filename_format.as_deref().unwrap_or("format not recorded");
        row("backing", format!("{backing} ({format})"));
        if let Some(place) = image.full_backing_filename.as_ref().filter(|place| *place != backing) {
            row("found at", place.clone());
        }
    }
    if image.dirty_flag {
        row("state", "not closed cleanly; reference counts will be set right when it is written".to_owned());
    }
    if let Some(FormatSpecific::Qcow2(qcow2)) = &image.format_specific {
        row("features", features(qcow2));
        if let Some(file) = &qcow2.data_file {
            row("data file", file.clone());
        }
        if qcow2.corrupt == Some(true) {
            row("state", "marked as corrupt; see headwater check".to_owned());
        }
    }
    for snapshot in &image.snapshots {
        row("snapshot", format!("{} {}", snapshot.id, snapshot.name));
    }
    text
}

fn features(qcow2: &Qcow2Info) -> String {
    let mut features = vec![
        format!("compat {}", qcow2.compat),
        format!("compression {}", qcow2.compression_type),
        format!("refcounts of {} bits", qcow2.refcount_bits),
    ];
    if qcow2.extended_l2 == Some(true) {
        features.push("subclusters".to_owned());
    }
    if qcow2.lazy_refcounts == Some(true) {
        features.push("lazy refcounts".to_owned());
    }
    features.join(", ")
}
