//! The demonstration's source: a raw file behind headwater's own NBD server, made far away, on a thread of its own.

use super::delay::DelayNode;
use super::model::{Kind, Source};
use crate::address::Address;
use crate::exports::Exports;
use crate::failure::{Failure, Outcome};
use crate::runtime;
use headwater_block::{Disk, DiskOptions, TokioClock};
use headwater_nbd::NbdUri;
use headwater_storage::file::{Cache, Engine, FileNode, FileOptions, IoMode};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// How much of the source is made at once, in bytes.
const STEP: usize = 1 << 20;

/// Writes `source` to a file, sparse where it has holes. Returns how many bytes of data it holds.
///
/// # Errors
/// Those of the file system.
pub fn make(source: Source, path: &Path) -> Outcome<u64> {
    let cannot = |err| Failure::new(format!("cannot make the source {}: {err}", path.display()));
    let mut file = File::create_new(path).map_err(cannot)?;
    file.set_len(source.size).map_err(cannot)?;
    let mut buf = vec![0; STEP];
    let mut data = 0;
    for (range, kind) in source.pieces() {
        let mut at = range.start;
        while at < range.end && kind != Kind::Hole {
            let part = &mut buf[..STEP.min((range.end - at) as usize)];
            source.fill(at, part);
            file.write_all_at(part, at).map_err(cannot)?;
            at += part.len() as u64;
        }
        data += if kind == Kind::Data { range.end - range.start } else { 0 };
    }
    file.flush().map_err(cannot)?;
    Ok(data)
}

/// The server. It ends when this is dropped.
pub struct Far {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Outcome>>,
}

impl Far {
    /// Serves the file at `path` at `uri`, every request `latency` away. Returns when clients can connect.
    ///
    /// # Errors
    /// If the file can't be opened or the address be had.
    pub fn start(path: &Path, uri: &NbdUri, latency: Duration) -> Outcome<Self> {
        let (path, uri) = (path.to_owned(), uri.clone());
        let (stop, stopped) = oneshot::channel();
        let (tell, ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            runtime::run(async move {
                let engine = Engine::new(IoMode::Auto)?;
                // Far away, but not slow: it comes from the page cache.
                let options =
                    FileOptions { read_only: true, cache: Cache::Buffered, ..FileOptions::default() };
                let file = FileNode::open(&engine, &path, options)?;
                let clock = Rc::new(TokioClock::new());
                let far = DelayNode::new(file, clock.clone(), latency);
                let disk = Disk::new(far, clock, DiskOptions { read_only: true, ..DiskOptions::default() });
                let exports = Exports::start(&[Address::Nbd(uri)], &disk, false).await?;
                // Whoever waits may have given up.
                let _ = tell.send(());
                let _ = stopped.await;
                exports.stop().await;
                Ok(())
            })
        });
        let far = Self { stop: Some(stop), thread: Some(thread) };
        match ready.recv() {
            Ok(()) => Ok(far),
            Err(_) => far.end().and(Err(Failure::new("the source's server didn't start"))),
        }
    }

    /// Stops the server and says how it fared.
    ///
    /// # Errors
    /// Those of the server.
    pub fn end(mut self) -> Outcome {
        self.stop.take();
        let thread = self.thread.take().map(JoinHandle::join);
        match thread {
            Some(Ok(result)) => result,
            _ => Err(Failure::new("the source's server failed")),
        }
    }
}
