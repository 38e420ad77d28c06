//! A directory in which what was read of remote sources is kept, for other disks, other processes and another day.
//!
//! - [`CacheDir`], here: the directory, its bound, and what goes when there is no room.
//! - `file`: the file of one source.
//!
//! # What a file may be used for
//! It belongs to one source: the address, the size and the marks of its contents (an object's ETag or Last-Modified) are in its name, as a digest, and in its
//! header, in full. A source that changed has another file, and one without such marks (an NBD export) has none: nothing would tell old bytes from
//! new ones.
//!
//! # Several processes
//! All may read and write one file at once: what they write is the same. Whoever uses a file holds a shared lock (flock) on it, and only who gets the
//! exclusive one removes it. A file is never made shorter and never used again for something else, so that one which somebody removed by hand is
//! no harm to those who have it open: data and marks go away together.

mod file;

pub use self::file::CacheFile;
use crate::file::Engine;
use aws_lc_rs::digest::{SHA256, digest};
use headwater_block::{Error, ErrorKind, Identity, Result};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::cell::RefCell;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};

/// How the names of the files end.
const EXTENSION: &str = ".blocks";

/// What is left free on the file system, in bytes: others need it more.
const LEAVE_FREE: u64 = 1 << 30;

/// How much a directory takes where nothing else is said, in bytes.
pub const CACHE_SIZE: u64 = 32 << 30;

/// A directory for parts of sources; see the [module](self).
pub struct CacheDir {
    fd: OwnedFd,
    path: PathBuf,
    limit: u64,
    engine: Rc<Engine>,
    /// Those that are in use.
    open: RefCell<Vec<Weak<CacheFile>>>,
}

/// A file of the directory.
struct Listed {
    /// When it was used last, in seconds and nanoseconds.
    used: (i64, u64),
    /// What it takes.
    bytes: u64,
    name: CString,
}

impl CacheDir {
    /// Opens the directory at `path`, which is made for its owner alone if only it is lacking. Its files take at most `limit` bytes together, unless
    /// those that are in use take more.
    ///
    /// # Errors
    /// `PermissionDenied` if others may write there, and what the system says.
    pub fn open(engine: &Rc<Engine>, path: &Path, limit: u64) -> Result<Rc<Self>> {
        let shown = path.display();
        Self::make(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|err| failed(err, format!("open the cache directory {shown}")))?;
        let stat = rustix::fs::fstat(&fd).map_err(|err| failed(err, format!("look at {shown}")))?;
        if stat.st_mode & 0o022 != 0 {
            let message = format!(
                "others can write to the cache directory {shown}, and what is there is given to guests; take that right away (chmod go-w)"
            );
            return Err(Error::new(ErrorKind::PermissionDenied, message));
        }
        // Names stay good when the working directory changes.
        let path =
            std::fs::canonicalize(path).map_err(|err| Error::from_io(err, format_args!("find {shown}")))?;
        Ok(Rc::new(Self { fd, path, limit, engine: engine.clone(), open: RefCell::default() }))
    }

    /// Makes the directory, if only it is lacking: for a process that opens it later, when it may make none.
    ///
    /// # Errors
    /// What the system says.
    pub fn make(path: &Path) -> Result<()> {
        match rustix::fs::mkdirat(CWD, path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(err) => Err(failed(err, format!("make the cache directory {}", path.display()))),
        }
    }

    /// The file for the source at `address` with this size and identity; none if nothing marks its contents.
    ///
    /// # Errors
    /// What the system says, and `Corrupt` for a file that isn't what its name says.
    pub async fn file(
        self: &Rc<Self>,
        address: &str,
        size: u64,
        identity: &Identity,
    ) -> Result<Option<Rc<CacheFile>>> {
        if !identity.marks_bytes() {
            return Ok(None);
        }
        let marks: Vec<String> =
            identity.contents.iter().map(|(name, value)| format!("{name}: {value}")).collect();
        let text = format!("{address}\n{size}\n{}", marks.join("\n"));
        let digest = digest(&SHA256, text.as_bytes());
        let name: String = digest.as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let file = CacheFile::open(self, &format!("{name}{EXTENSION}"), size, &text).await?;
        let mut open = self.open.borrow_mut();
        open.retain(|file| file.strong_count() > 0);
        open.push(Rc::downgrade(&file));
        drop(open);
        Ok(Some(file))
    }

    /// Waits until what was to be kept is, durably: before the process ends.
    pub async fn settle(&self) {
        let open: Vec<_> = self.open.borrow().iter().filter_map(Weak::upgrade).collect();
        for file in open {
            file.settle().await;
        }
    }

    fn shown(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    /// Opens `name`, makes it if it isn't there, and holds it: nobody removes it as long as what this returns lives.
    fn hold(&self, name: &str) -> Result<OwnedFd> {
        let cannot = |err| failed(err, format!("open {}", self.shown(name)));
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        for _ in 0..100 {
            let fd = rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR).map_err(cannot)?;
            match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockShared) {
                // Somebody may have removed it in between.
                Ok(()) if rustix::fs::fstat(&fd).map_err(cannot)?.st_nlink > 0 => return Ok(fd),
                Ok(()) | Err(Errno::WOULDBLOCK) => {}
                Err(err) => return Err(cannot(err)),
            }
            // Removing takes a moment.
            std::thread::yield_now();
        }
        Err(Error::new(ErrorKind::InUse, format!("{}: others remove it again and again", self.shown(name))))
    }

    /// Makes room for `bytes` more, by removing what nobody uses, the longest unused first. False if there is none.
    fn make_room(&self, bytes: u64) -> bool {
        let Ok(room) = self.try_room(bytes) else { return false };
        room
    }

    fn try_room(&self, bytes: u64) -> std::result::Result<bool, Errno> {
        let stat = rustix::fs::fstatvfs(&self.fd)?;
        if stat.f_bavail.saturating_mul(stat.f_frsize) < LEAVE_FREE.saturating_add(bytes) {
            return Ok(false);
        }
        let mut files = self.files()?;
        let mut taken: u64 = files.iter().map(|file| file.bytes).sum();
        files.sort_by_key(|file| file.used);
        for file in files {
            if taken.saturating_add(bytes) <= self.limit {
                break;
            }
            if self.remove_unused(&file.name) {
                taken = taken.saturating_sub(file.bytes);
            }
        }
        Ok(taken.saturating_add(bytes) <= self.limit)
    }

    /// All files.
    fn files(&self) -> std::result::Result<Vec<Listed>, Errno> {
        let mut files = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            if !entry.file_name().to_bytes().ends_with(EXTENSION.as_bytes()) {
                continue;
            }
            // One that was removed just now takes nothing.
            if let Ok(stat) = rustix::fs::statat(&self.fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW) {
                files.push(Listed {
                    used: (stat.st_mtime, stat.st_mtime_nsec),
                    bytes: u64::try_from(stat.st_blocks).unwrap_or(0) * 512,
                    name: entry.file_name().to_owned(),
                });
            }
        }
        Ok(files)
    }

    /// Removes a file, unless somebody uses it.
    fn remove_unused(&self, name: &CString) -> bool {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::openat(&self.fd, name.as_c_str(), flags, Mode::empty()) else {
            return false;
        };
        // Who opens it meanwhile sees that it is gone.
        rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).is_ok()
            && rustix::fs::unlinkat(&self.fd, name.as_c_str(), AtFlags::empty()).is_ok()
    }
}

fn failed(err: Errno, what: String) -> Error {
    Error::from_io(err.into(), what)
}

#[cfg(test)]
mod tests;
