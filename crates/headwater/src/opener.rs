//! From names to nodes: joins the storage that can be reached with the image formats, which don't know each other.

use crate::cli::{Cache as CacheArg, Io, OpenArgs};
use crate::failure::{Failure, Outcome, code};
use crate::kept_sources::KeptSources;
use crate::mirrors::Mirrors;
use crate::source::is_uri;
use headwater_block::{BufferMut, Error, ErrorKind, LocalFuture, Node, Result};
use headwater_image::info::{self, ChainInfo};
use headwater_image::open::{self, Below, Layer, OpenOptions, OpenedImage, ProtocolOpener, ProtocolOptions};
use headwater_image::open_gate::Trust;
use headwater_image::probe::{self, Format, PROBE_LEN};
use headwater_image::qcow2::check::{self, CheckOptions, CheckReport, Repair};
use headwater_image::qcow2::create::{self, CreateOptions};
use headwater_storage::file::{Cache, Engine, FileNode, FileOptions, IoMode};
use headwater_storage::open::{OpenOptions as ReachOptions, open_protocol};
use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// What an image is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To be read; a writer in another process is kept away.
    Read,
    /// To be read and written; all other processes are kept away.
    Write,
    /// To be looked at while others may write to it.
    Look,
}

/// Opens and makes images. Belongs to one thread, as the nodes that it opens.
pub struct Opener {
    engine: Rc<Engine>,
    cache: Cache,
    trust: Trust,
    table_cache: u64,
    times: Option<Times>,
    /// Where what is read of remote sources is kept.
    kept: Option<Rc<KeptSources>>,
    mirrors: Option<Rc<Mirrors>>,
    /// How much the first remote image is asked for as it is opened.
    read_ahead: Cell<u64>,
}

/// How long is waited for a remote image.
#[derive(Debug, Clone, Copy)]
struct Times {
    retry: Duration,
    timeout: Duration,
}

impl Opener {
    /// An opener that does as `args` say.
    ///
    /// # Errors
    /// If the file engine that was asked for can't be had.
    pub fn new(args: &OpenArgs) -> Outcome<Self> {
        let engine = Engine::new(match args.io {
            Io::Auto => IoMode::Auto,
            Io::Ring => IoMode::Ring,
            Io::Threads => IoMode::Threads,
        })?;
        let cache = match args.cache {
            CacheArg::Auto => Cache::Auto,
            CacheArg::Direct => Cache::Direct,
            CacheArg::Buffered => Cache::Buffered,
        };
        let mut trust = Trust { allow_probed_format: args.allow_probed_format, ..Trust::default() };
        for name in &args.allow_backing {
            trust.allow_source(name);
        }
        let (times, kept, mirrors) = (None, None, None);
        let (table_cache, read_ahead) = (args.table_cache, Cell::new(0));
        Ok(Self { engine, cache, trust, table_cache, times, kept, mirrors, read_ahead })
    }

    /// The same, but requests to remote images are made again when nothing comes for the time of `timeout`, and count as failed after that of
    /// `retry`.
    pub fn with_retry(self, retry: Duration, timeout: Duration) -> Self {
        Self { times: Some(Times { retry, timeout }), ..self }
    }

    /// The same, but what is read of remote sources is kept in the directory, which takes at most so many bytes.
    ///
    /// # Errors
    /// If the directory can't be had.
    pub fn with_cache_dir(self, directory: Option<&Path>, size: u64) -> Outcome<Self> {
        let kept = directory.map(|path| KeptSources::open(&self.engine, path, size)).transpose()?;
        Ok(Self { kept: kept.map(Rc::new), ..self })
    }

    /// What [`Opener::with_cache_dir`] keeps.
    pub fn kept_sources(&self) -> Option<Rc<KeptSources>> {
        self.kept.clone()
    }

    /// The same, but the source that `mirrors` are of is read through them.
    pub fn with_mirrors(self, mirrors: Option<Rc<Mirrors>>) -> Self {
        Self { mirrors, ..self }
    }

    /// The same, but of the first image that is opened, if it is behind HTTP, so many bytes are asked for at once, because they will be read soon.
    pub fn with_read_ahead(self, bytes: u64) -> Self {
        Self { read_ahead: Cell::new(bytes), ..self }
    }

    /// The storage that the operator calls `name`, without a look at its format.
    ///
    /// # Errors
    /// Those of the storage.
    pub async fn open_storage(&self, name: &str) -> Result<Rc<dyn Node>> {
        self.reach(name, ProtocolOptions { read_only: true, ..ProtocolOptions::default() }).await
    }

    /// Opens the disk that the operator calls `name`, with its chain.
    ///
    /// # Errors
    /// Those of storage and images, and of the gate for names found inside images.
    pub async fn open(&self, name: &str, format: Option<Format>, access: Access) -> Result<Rc<dyn Node>> {
        Ok(self.open_with(name, format, access, Below::Follow).await?.node)
    }

    /// As [`Opener::open`], with a say in what is below the image; also tells which images there are.
    ///
    /// # Errors
    /// As for [`Opener::open`].
    pub async fn open_with(
        &self,
        name: &str,
        format: Option<Format>,
        access: Access,
        below: Below,
    ) -> Result<OpenedImage> {
        open::open_image(name, &self.open_options(format, access, below), self).await
    }

    /// The images of a chain as far as they can be opened, the top first, and what ended the chain early.
    pub async fn walk(
        &self,
        name: &str,
        format: Option<Format>,
        below: Below,
    ) -> (Vec<Layer>, Option<Error>) {
        open::walk(name, &self.open_options(format, Access::Look, below), self).await
    }

    /// What there is to tell about an image and, if `chain`, about those below it.
    ///
    /// # Errors
    /// If the image itself can't be opened.
    pub async fn info(
        &self,
        name: &str,
        format: Option<Format>,
        access: Access,
        chain: bool,
    ) -> Result<ChainInfo> {
        let below = if chain { Below::Follow } else { Below::Nothing };
        info::chain_info(name, &self.open_options(format, access, below), self).await
    }

    fn open_options(&self, format: Option<Format>, access: Access, below: Below) -> OpenOptions {
        // Where the caller brings the chain, its tables have half of the memory already.
        let share = if matches!(below, Below::Node(_)) { self.table_cache / 2 } else { self.table_cache };
        OpenOptions {
            format,
            read_only: access != Access::Write,
            force_share: access == Access::Look,
            trust: self.trust.clone(),
            cache_size: share,
            below,
        }
    }

    fn file_options(&self, access: Access) -> FileOptions {
        FileOptions {
            read_only: access != Access::Write,
            cache: self.cache,
            force_share: access == Access::Look,
            ..FileOptions::default()
        }
    }

    async fn reach(&self, name: &str, how: ProtocolOptions) -> Result<Rc<dyn Node>> {
        let mut options = ReachOptions::new(self.engine.clone()).read_only(how.read_only);
        options.file.cache = self.cache;
        options.file.force_share = how.force_share;
        if let Some(Times { retry, timeout }) = self.times {
            (options.nbd.retry, options.nbd.request_timeout) = (retry, timeout);
            (options.http.retry, options.http.request_timeout) = (retry, timeout);
        }
        let node = match &self.mirrors {
            Some(mirrors) if mirrors.is_source(name) && how.read_only => mirrors.open(options).await?,
            _ => {
                options.http.read_ahead = self.read_ahead.take();
                open_storage(name, &options).await?
            }
        };
        match &self.kept {
            Some(kept) if is_uri(name) && node.is_read_only() => kept.in_front_of(node).await,
            _ => Ok(node),
        }
    }

    /// Makes an empty file, which must not exist.
    ///
    /// # Errors
    /// `AlreadyExists`, and what the system says.
    pub fn create_file(&self, path: &Path) -> Result<Rc<FileNode>> {
        FileNode::create(&self.engine, path, self.file_options(Access::Write))
    }

    /// Makes a qcow2 image. It appears whole or not at all, whenever this is interrupted, and never in place of something else.
    ///
    /// # Errors
    /// If there is something at `path` already, it can't be written, or no image can be as `options` say.
    pub async fn create_qcow2(&self, path: &Path, options: &CreateOptions) -> Outcome {
        let shown = path.display();
        if path.symlink_metadata().is_ok() {
            return Err(Failure::new(format!("{shown} exists; remove it, or choose another name")));
        }
        let Some(name) = path.file_name() else {
            return Err(Failure::new(format!("{shown} is no name for a file")));
        };
        let temporary =
            path.with_file_name(format!(".{}.{}.new", name.to_string_lossy(), std::process::id()));
        let removed = Temporary(&temporary);
        let make = async {
            let file = self.create_file(&temporary)?;
            create::create(&*file, options).await?;
            file.close().await
        };
        make.await.map_err(|err| {
            // The name that people know.
            Failure::new(err.to_string().replace(&*temporary.to_string_lossy(), &path.to_string_lossy()))
        })?;
        rename_new(&temporary, path).map_err(|err| Failure::new(format!("cannot make {shown}: {err}")))?;
        drop(removed);
        let directory =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Not all file systems have durable directories; then nothing more can be done.
        let _ = std::fs::File::open(directory).and_then(|directory| directory.sync_all());
        Ok(())
    }

    /// Checks the image at `path`, and repairs it if asked to. None if its format has nothing to check.
    ///
    /// # Errors
    /// If it can't be read, or is in use.
    pub async fn check(
        &self,
        path: &Path,
        format: Option<Format>,
        repair: Repair,
    ) -> Outcome<Option<CheckReport>> {
        let access = if repair == Repair::None { Access::Read } else { Access::Write };
        let file = FileNode::open(&self.engine, path, self.file_options(access))?;
        let format = match format {
            Some(format) => format,
            None => {
                let len = file.size().min(PROBE_LEN as u64) as usize;
                let head = file.read(0, BufferMut::new(len)).await?;
                probe::probe(&head, file.name()).map_err(cannot_be_checked)?
            }
        };
        if format == Format::Raw {
            return Ok(None);
        }
        let options = CheckOptions { repair, ..CheckOptions::default() };
        let report = check::check(file.clone(), options).await.map_err(cannot_be_checked)?;
        file.close().await?;
        Ok(Some(report))
    }
}

/// Opens a path or an address of the operator's.
pub(crate) async fn open_storage(name: &str, options: &ReachOptions) -> Result<Rc<dyn Node>> {
    if is_uri(name) {
        open_protocol(name, options).await
    } else {
        // As it is written: `a:b` is a file of that name.
        Ok(FileNode::open(&options.engine, name, options.file)?)
    }
}

impl ProtocolOpener for Opener {
    fn open<'a>(&'a self, name: &'a str, how: ProtocolOptions) -> LocalFuture<'a, Result<Rc<dyn Node>>> {
        Box::pin(self.reach(name, how))
    }
}

/// Why a check ended: what can't be checked has a code of its own.
fn cannot_be_checked(err: Error) -> Failure {
    match err.kind() {
        ErrorKind::Unsupported => Failure { code: code::UNSUPPORTED, ..Failure::new(err) },
        _ => err.into(),
    }
}

/// Renames, without replacing anything where the file system can promise that.
fn rename_new(from: &Path, to: &Path) -> std::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => std::fs::rename(from, to),
        done => Ok(done?),
    }
}

/// A file that goes when this does.
struct Temporary<'a>(&'a Path);

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        // If it was never made there is nothing to remove.
        let _ = std::fs::remove_file(self.0);
    }
}
