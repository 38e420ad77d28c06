//! Remote sources whose bytes are kept in a directory: what `--cache-dir` does where there is one disk.

use headwater_block::share::SharePool;
use headwater_block::{Error, ErrorKind, Node, Result};
use headwater_storage::cache_dir::CacheDir;
use headwater_storage::file::Engine;
use std::path::Path;
use std::rc::Rc;

/// What is kept in memory beside, in bytes: nobody else asks this process.
const MEMORY: u64 = 0;

/// See the module.
pub struct KeptSources {
    directory: Rc<CacheDir>,
    pool: Rc<SharePool>,
}

impl KeptSources {
    /// Keeps in the directory at `path`, which takes at most `size` bytes.
    ///
    /// # Errors
    /// If the directory can't be had.
    pub fn open(engine: &Rc<Engine>, path: &Path, size: u64) -> Result<Self> {
        Ok(Self { directory: CacheDir::open(engine, path, size)?, pool: SharePool::new(MEMORY) })
    }

    /// A node that reads from the directory what is there, and the rest from `node`, which is remote and read-only.
    ///
    /// # Errors
    /// `Unsupported` if nothing marks what it holds, and those of the directory.
    pub async fn in_front_of(&self, node: Rc<dyn Node>) -> Result<Rc<dyn Node>> {
        let identity = node.identity()?;
        let Some(file) = self.directory.file(node.name(), node.size(), &identity).await? else {
            let message = format!(
                "{}: nothing marks its contents (an ETag, say), so that old bytes could not be told from new ones; leave --cache-dir out",
                node.name()
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        };
        let shared = self.pool.join(node, None, Some(file));
        shared.set_readers(1);
        Ok(shared)
    }

    /// Waits until what was read is kept.
    pub async fn settle(&self) {
        self.directory.settle().await;
    }
}
