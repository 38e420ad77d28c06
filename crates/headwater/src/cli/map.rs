//! `headwater map`: which layer holds which bytes; on a terminal a picture, in a pipe a table, with `--json` qemu-img's fields.

use super::{FormatArg, OpenArgs};
use crate::confine::Writes;
use crate::failure::{Failure, Outcome};
use crate::opener::{Access, Opener};
use crate::output;
use crate::picture;
use crate::runtime;
use clap::Args;
use headwater_block::{ExtentKind, Node, Result};
use serde::Serialize;
use std::fmt::Write;
use std::io::IsTerminal;
use std::rc::Rc;

/// Arguments of `map`.
#[derive(Debug, Clone, Args)]
pub struct MapArgs {
    /// The image: a file, or behind nbd://, nbd+unix://, nbds:// (TLS), http://, https://, s3://, gs:// or az://.
    #[arg(value_parser = crate::source::parse)]
    pub file: String,
    /// Print one object for each extent, with the names of fields that qemu-img uses.
    #[arg(long, conflicts_with = "picture")]
    pub json: bool,
    /// Draw the chain even if standard output is no terminal.
    #[arg(long)]
    pub picture: bool,
    /// The image's format; without it, its first bytes tell.
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
    /// How files are opened.
    #[command(flatten)]
    pub open: OpenArgs,
}

/// A run of bytes that one layer decides about. The names are qemu-img's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    /// Where it starts, in bytes of the disk.
    start: u64,
    /// Its length in bytes.
    length: u64,
    /// The layer; 0 is the top.
    depth: u32,
    /// Some layer says something about these bytes.
    present: bool,
    /// It reads as zeroes.
    zero: bool,
    /// It holds data.
    data: bool,
    /// The data are compressed.
    compressed: bool,
    /// Where it lies in the layer's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
}

/// Gives `each` all rows of the disk on top of `top`, from its start to its end: one at a time, because a large disk has millions.
async fn rows(top: &Rc<dyn Node>, mut each: impl FnMut(&Row) -> Outcome) -> Outcome {
    let size = top.size();
    let mut last: Option<Row> = None;
    let mut pos = 0;
    while pos < size {
        let row = row_at(top, pos, size).await?;
        pos += row.length;
        match last.as_mut().filter(|last| continues(last, &row)) {
            Some(last) => last.length += row.length,
            None => last.replace(row).iter().try_for_each(&mut each)?,
        }
    }
    last.iter().try_for_each(each)
}

/// What holds at `pos`. A layer says nothing about bytes past its end.
async fn row_at(top: &Rc<dyn Node>, pos: u64, size: u64) -> Result<Row> {
    let mut node = top.clone();
    let mut end = size;
    let mut depth = 0;
    loop {
        let extent = node.status(pos..end).await?;
        end = end.min(extent.end());
        let row = Row {
            start: pos,
            length: end - pos,
            depth,
            present: extent.kind != ExtentKind::Unallocated,
            zero: extent.kind != ExtentKind::Data,
            data: extent.kind == ExtentKind::Data,
            compressed: extent.compressed,
            offset: extent.host_offset,
        };
        match node.backing().filter(|backing| !row.present && pos < backing.size()) {
            Some(backing) => {
                end = end.min(backing.size());
                node = backing;
                depth += 1;
            }
            None => return Ok(row),
        }
    }
}

fn continues(last: &Row, next: &Row) -> bool {
    let kind = |row: &Row| (row.depth, row.present, row.data, row.compressed);
    let offset = last.offset.map(|offset| offset + last.length);
    kind(last) == kind(next) && offset == next.offset
}

/// Prints the map.
///
/// # Errors
/// If the image can't be opened or read.
pub fn run(args: MapArgs) -> Outcome {
    Writes::default().confine();
    let picture = args.picture || !args.json && std::io::stdout().is_terminal();
    runtime::run(async move {
        let opener = Opener::new(&args.open)?;
        let top = opener.open(&args.file, args.format.map(Into::into), Access::Look).await?;
        if picture {
            return output::print(picture::draw(&top).await?.as_bytes());
        }
        let mut listing = if args.json { Listing::json() } else { Listing::table(&top) };
        rows(&top, |row| listing.row(row)).await?;
        listing.end()
    })
}

/// How much text is gathered before it is printed, in bytes.
const PRINT_AT: usize = 64 << 10;

/// The rows as JSON, one in each line, or as a table for people and for programs that split lines.
struct Listing {
    text: String,
    /// The names of the layers, for the table.
    names: Option<Vec<String>>,
    /// No row yet.
    first: bool,
}

impl Listing {
    fn json() -> Self {
        Self { text: "[".to_owned(), names: None, first: true }
    }

    fn table(top: &Rc<dyn Node>) -> Self {
        let names = picture::layers(top).iter().map(|node| output::line(node.name())).collect();
        let text = format!("{:<16} {:<16} {:<6} {:<16} {}\n", "start", "length", "holds", "at", "layer");
        Self { text, names: Some(names), first: true }
    }

    fn row(&mut self, row: &Row) -> Outcome {
        let Some(names) = &self.names else {
            let json = serde_json::to_string(row).map_err(Failure::new)?;
            self.text += if std::mem::take(&mut self.first) { "\n  " } else { ",\n  " };
            self.text += &json;
            return self.print(PRINT_AT);
        };
        let holds = match row {
            Row { data: true, compressed: true, .. } => "packed",
            Row { data: true, .. } => "data",
            Row { present: true, .. } => "zero",
            _ => "-",
        };
        let at = row.offset.map_or_else(|| "-".to_owned(), |offset| format!("{offset:#x}"));
        let layer = names.get(row.depth as usize).filter(|_| row.present).map_or("-", String::as_str);
        let (start, length) = (format!("{:#x}", row.start), format!("{:#x}", row.length));
        let _ = writeln!(self.text, "{start:<16} {length:<16} {holds:<6} {at:<16} {layer}");
        self.print(PRINT_AT)
    }

    fn end(mut self) -> Outcome {
        if self.names.is_none() {
            self.text += if self.first { "]\n" } else { "\n]\n" };
        }
        self.print(0)
    }

    /// Prints what was gathered if it is enough.
    fn print(&mut self, enough: usize) -> Outcome {
        if self.text.len() >= enough {
            output::print(self.text.as_bytes())?;
            self.text.clear();
        }
        Ok(())
    }
}
