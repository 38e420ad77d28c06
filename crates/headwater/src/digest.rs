//! Making a manifest: many reads at once, hashed on threads beside, put together in order.

use crate::cli::digest::DigestArgs;
use crate::confine::Writes;
use crate::failure::{Failure, Outcome};
use crate::opener::Opener;
use crate::runtime;
use futures_util::stream::{FuturesOrdered, StreamExt};
use headwater_block::manifest::{Builder, Promise, chunk_for, hex, promise_of};
use headwater_block::{BufferMut, Error, ErrorKind, ExtentKind, Manifest, Node, Result};
use std::io::{BufWriter, Write};
use std::rc::Rc;
use std::time::Duration;

/// How many bytes are read at once, and how many of these reads run.
const READ: u64 = 2 << 20;
const DEPTH: usize = 16;

/// Carries out the command.
///
/// # Errors
/// If the image can't be read, or the manifest not be written.
pub fn run(args: DigestArgs) -> Outcome {
    Writes::default().optional(args.output.as_deref()).confine();
    runtime::run(async move {
        let [retry, timeout] = [args.retry, args.timeout].map(|seconds| Duration::from_secs(seconds.into()));
        let opener = Opener::new(&args.open)?.with_retry(retry, timeout);
        let node = opener.open_storage(&args.image).await?;
        let chunk = match args.chunk_size {
            Some(chunk) => u32::try_from(chunk).unwrap_or(u32::MAX),
            None => chunk_for(node.size()),
        };
        let manifest = digest(&node, chunk).await?;
        node.close().await?;
        match &args.output {
            Some(path) => {
                let cannot = |err| Failure::new(format!("cannot write {}: {err}", path.display()));
                let file = std::fs::File::create(path).map_err(cannot)?;
                let mut out = BufWriter::new(file);
                manifest.write(&mut out).and_then(|()| out.flush()).map_err(cannot)?;
                eprintln!("{} has the root {}", args.image, hex(manifest.root()));
                Ok(())
            }
            None => {
                let mut out = BufWriter::new(std::io::stdout().lock());
                let written = manifest.write(&mut out).and_then(|()| out.flush());
                written.map_err(|err| Failure::new(format!("cannot write the manifest: {err}")))
            }
        }
    })
}

/// The manifest of what `node` holds.
///
/// # Errors
/// Those of reading, and sizes for which there is no manifest.
async fn digest(node: &Rc<dyn Node>, chunk: u32) -> Result<Manifest> {
    let size = node.size();
    let mut builder = Builder::new(size, chunk)?;
    let unit = u64::from(chunk);
    let step = READ.max(unit);
    let mut running = FuturesOrdered::new();
    let mut at = 0;
    loop {
        while at < size && running.len() < DEPTH {
            let end = at.saturating_add(step).min(size);
            // A hole is zeroes, which needn't be read.
            let hole = hole_at(&**node, at..size).await?;
            if let Some(hole) = hole.filter(|hole| *hole == size || hole - at >= unit) {
                let whole = if hole == size { hole } else { hole - hole % unit };
                running.push_back(futures_util::future::Either::Left(async move {
                    Ok::<_, Error>(vec![(Promise::Zeroes, (whole - at).div_ceil(unit))])
                }));
                at = whole;
                continue;
            }
            running.push_back(futures_util::future::Either::Right(promises(
                node.clone(),
                at,
                end - at,
                chunk,
            )));
            at = end;
        }
        let Some(done) = running.next().await else { break };
        for (promise, count) in done? {
            builder.push(promise, count)?;
        }
    }
    builder.finish()
}

/// Where the hole that begins at the start of `range` ends, if there is one.
async fn hole_at(node: &dyn Node, range: std::ops::Range<u64>) -> Result<Option<u64>> {
    let extent = node.status(range).await?;
    Ok((extent.kind == ExtentKind::Zero).then(|| extent.end()))
}

async fn promises(node: Rc<dyn Node>, at: u64, len: u64, chunk: u32) -> Result<Vec<(Promise, u64)>> {
    // At most the larger of a read and a chunk.
    let data = node.read(at, BufferMut::new(len as usize)).await?;
    // Buffers stay on their thread.
    let bytes = data.to_vec();
    drop(data);
    let hashing = tokio::task::spawn_blocking(move || {
        bytes.chunks(chunk as usize).map(|bytes| (promise_of(bytes), 1)).collect()
    });
    hashing.await.map_err(|_| Error::new(ErrorKind::Io, "the thread that hashed is gone"))
}
