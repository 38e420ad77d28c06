//! `headwater check`: exit codes and JSON as qemu-img's.

use super::{FormatArg, OpenArgs};
use crate::confine::Writes;
use crate::failure::{Failure, Outcome, code};
use crate::opener::Opener;
use crate::output;
use crate::runtime;
use clap::{Args, ValueEnum};
use headwater_image::probe::Format;
use headwater_image::qcow2::check::{CheckReport, Repair, Severity};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;

/// Arguments of `check`.
#[derive(Debug, Clone, Args)]
#[command(
    after_long_help = "Exit codes, as qemu-img's: 0 nothing is wrong (any more), 2 corruptions, 3 leaks only, 63 the image is of a kind that can't be \
                       checked (raw, another format, encrypted, unknown features), 1 the check could not be done."
)]
pub struct CheckArgs {
    /// The image.
    pub file: PathBuf,
    /// Repair what is wrong.
    #[arg(long, value_enum)]
    pub repair: Option<RepairArg>,
    /// Print JSON with the names of fields that qemu-img uses.
    #[arg(long)]
    pub json: bool,
    /// The image's format; without it, its first bytes tell.
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
    /// How files are opened.
    #[command(flatten)]
    pub open: OpenArgs,
}

/// What to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RepairArg {
    /// Give leaked clusters back.
    Leaks,
    /// Leaks, and everything else that can be repaired.
    All,
}

/// The report with qemu-img's names of fields; numbers that are zero are left out, as there.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report<'a> {
    filename: String,
    format: &'static str,
    check_errors: u64,
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    findings: Vec<&'a str>,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Checks, repairs if asked to, and says what was found.
///
/// # Errors
/// See the exit codes.
pub fn run(args: CheckArgs) -> Outcome {
    let name = args.file.display().to_string();
    let repair = match args.repair {
        None => Repair::None,
        Some(RepairArg::Leaks) => Repair::Leaks,
        Some(RepairArg::All) => Repair::All,
    };
    Writes::default().optional(args.repair.and(Some(&args.file)).map(PathBuf::as_path)).confine();
    let checked = runtime::run(async move {
        let opener = Opener::new(&args.open)?;
        opener.check(&args.file, args.format.map(Into::into), repair).await
    })?;
    let Some(report) = checked else {
        let message = format!("{name}: a raw image has no structure that could be checked");
        return Err(Failure { code: code::UNSUPPORTED, ..Failure::new(message) });
    };
    if args.json {
        output::print_json(&Report {
            filename: name,
            format: Format::Qcow2.as_str(),
            check_errors: 0,
            image_end_offset: report.image_end,
            corruptions: report.corruptions,
            leaks: report.leaks,
            corruptions_fixed: report.corruptions_fixed,
            leaks_fixed: report.leaks_fixed,
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
            findings: report.findings.iter().map(|finding| finding.message.as_str()).collect(),
        })?;
    } else {
        output::print(text(&name, &report, repair).as_bytes())?;
    }
    match (report.corruptions, report.leaks) {
        (0, 0) => Ok(()),
        (0, _) => Err(Failure::silent(code::LEAKS)),
        _ => Err(Failure::silent(code::CORRUPT)),
    }
}

fn text(name: &str, report: &CheckReport, repair: Repair) -> String {
    let name = output::line(name);
    let mut text = String::new();
    for finding in &report.findings {
        let word = if finding.severity == Severity::Leak { "leak" } else { "ERROR" };
        let _ = writeln!(text, "{word}: {}", output::line(&finding.message));
    }
    if report.omitted > 0 {
        let _ = writeln!(text, "... and {} more", report.omitted);
    }
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        let (errors, leaks) = (report.corruptions_fixed, report.leaks_fixed);
        let _ = writeln!(text, "repaired: {errors} corruptions, {leaks} leaked clusters");
    }
    let _ = match (report.corruptions, report.leaks) {
        (0, 0) => writeln!(text, "{name}: nothing is wrong"),
        (0, leaks) => writeln!(
            text,
            "{name}: {leaks} clusters are leaked: wasted, harmless; --repair leaks gives them back"
        ),
        (errors, leaks) => writeln!(
            text,
            "{name}: {errors} corruptions and {leaks} leaked clusters; data may be lost or in danger. {}",
            if repair == Repair::All {
                "They can't be repaired in place: copy what can be read to a new image, for example with qemu-img convert --salvage"
            } else {
                "Copy the image, then try --repair all"
            }
        ),
    };
    let part = |n: u64| 100.0 * n as f64 / report.total_clusters.max(1) as f64;
    let of = |n: u64| 100.0 * n as f64 / report.allocated_clusters.max(1) as f64;
    let _ = writeln!(
        text,
        "{} of {} clusters allocated ({:.2}%), {:.2}% of them fragmented, {:.2}% compressed; the image ends at {}",
        report.allocated_clusters,
        report.total_clusters,
        part(report.allocated_clusters),
        of(report.fragmented_clusters),
        of(report.compressed_clusters),
        report.image_end
    );
    text
}
