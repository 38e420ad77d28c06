//! Files with boot traces: read for a stream, and written while a guest boots.

use crate::failure::{Failure, Outcome};
use headwater_block::Disk;
use headwater_block::disk::ReadWatch;
use headwater_job::boot_trace::MOST_BYTES;
use headwater_job::{BootRecorder, BootTrace};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// How often a trace that grows is written, so that little is lost if the process is killed.
const NOW_AND_THEN: Duration = Duration::from_secs(10);

/// Reads the trace in the file at `path`.
///
/// # Errors
/// If it can't be read, or is none.
pub fn load(path: &Path) -> Outcome<BootTrace> {
    let shown = path.display();
    let cannot = |why: String| Failure::new(format!("cannot use the boot trace {shown}: {why}"));
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes));
    read.map_err(|err| cannot(err.to_string()))?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(cannot(format!("it is longer than {MOST_BYTES} bytes")));
    }
    let text = String::from_utf8(bytes).map_err(|_| cannot("it is no text".to_owned()))?;
    BootTrace::parse(&text).map_err(|err| cannot(err.to_string()))
}

/// A trace that is being recorded.
pub struct Recording {
    recorder: Rc<BootRecorder>,
    path: PathBuf,
    writer: JoinHandle<()>,
}

impl Recording {
    /// Records what the disk's guests read first from now on, into the file at `path`, whose place it takes when there is something to write.
    ///
    /// # Errors
    /// If no file can be made there.
    pub fn start(path: &Path, disk: &Rc<Disk>) -> Outcome<Self> {
        let temporary = temporary(path)?;
        let made = File::create(&temporary).and_then(|_| std::fs::remove_file(&temporary));
        made.map_err(|err| cannot_write(path, &err))?;
        let recorder = BootRecorder::new(disk.clock().clone());
        let watch: Rc<dyn ReadWatch> = recorder.clone();
        disk.watch_reads(&watch);
        let writer = {
            let (recorder, path) = (recorder.clone(), path.to_owned());
            tokio::task::spawn_local(async move {
                loop {
                    tokio::time::sleep(NOW_AND_THEN).await;
                    if let Err(failure) = write(&recorder, &path).await {
                        tracing::warn!("{}", failure.message.unwrap_or_default());
                    }
                }
            })
        };
        Ok(Self { recorder, path: path.to_owned(), writer })
    }

    /// Writes what was recorded.
    ///
    /// # Errors
    /// What the system says.
    pub async fn finish(self) -> Outcome {
        self.writer.abort();
        // A write that it was waiting for is over when this returns.
        let _ = self.writer.await;
        write(&self.recorder, &self.path).await
    }
}

/// Replaces the file with what was recorded, if that is something, and more than it holds.
async fn write(recorder: &BootRecorder, path: &Path) -> Outcome {
    let Some(trace) = recorder.take_changed().filter(|trace| !trace.is_empty()) else { return Ok(()) };
    let (path, temporary) = (path.to_owned(), temporary(path)?);
    let written = tokio::task::spawn_blocking(move || {
        let replace = || -> std::io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(trace.to_string().as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)
        };
        replace().map_err(|err| cannot_write(&path, &err))
    });
    written.await.map_err(|lost| Failure::new(format!("a worker thread has ended: {lost}")))?
}

fn temporary(path: &Path) -> Outcome<PathBuf> {
    // The name by which a sandbox knows it.
    let name = headwater_sandbox::new_name(path, std::process::id());
    name.ok_or_else(|| Failure::new(format!("{} is no name for a boot trace", path.display())))
}

fn cannot_write(path: &Path, err: &std::io::Error) -> Failure {
    Failure::new(format!("cannot write the boot trace {}: {err}", path.display()))
}
