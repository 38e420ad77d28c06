//! System calls that may wait for long, beside the disk's thread.

use headwater_block::{Error, ErrorKind, Result};

/// Does `work` on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|lost| Err(Error::new(ErrorKind::Io, format!("a worker thread has ended: {lost}"))))
}
