//! A directory with small files that are replaced as a whole: after a crash at any moment a file is the old one or the new one.
//!
//! The directory is opened once; all that happens afterwards goes through its descriptor, so that neither a renamed directory nor a process that may
//! open nothing else is in the way.

use headwater_block::{Error, ErrorKind, Result};
use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The file whose lock says who uses the directory.
const LOCK: &str = ".lock";

/// How the names of files end that don't have their own yet.
const UNFINISHED: &str = ".headwater-new";

/// The largest file that is read, in bytes: a record with the longest boot trace is half as long.
const MOST: u64 = 8 << 20;

/// How often a lock is tried for, and the pause between: one that a killed process left behind is free soon.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(33);

/// Who else may use the directory at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Nobody.
    Alone,
    /// Others who share it, each with files of its own.
    Shared,
}

/// See the module.
#[derive(Debug)]
pub struct StateDir {
    fd: OwnedFd,
    shown: PathBuf,
    /// Holds the lock.
    _lock: Option<OwnedFd>,
}

impl StateDir {
    /// Opens the directory at `path`, which is made if only it is lacking, for its owner alone, and locks it.
    ///
    /// # Errors
    /// `InUse` if others use it, `PermissionDenied` if everybody may write there, and what the system says.
    pub fn open(path: &Path, sharing: Sharing) -> Result<Self> {
        let shown = path.display();
        match rustix::fs::mkdirat(CWD, path, Mode::RWXU) {
            // The entry is durable when its directory is.
            Ok(()) => sync(&open_directory(directory_of(path))?, directory_of(path))?,
            Err(Errno::EXIST) => {}
            Err(err) => return Err(failed(err, format!("make the state directory {shown}"))),
        }
        let fd = open_directory(path)?;
        let stat = rustix::fs::fstat(&fd).map_err(|err| failed(err, format!("look at {shown}")))?;
        if stat.st_mode & 0o002 != 0 {
            let message = format!(
                "everybody can write to the state directory {shown}, and what is there starts jobs; take that right away (chmod o-w)"
            );
            return Err(Error::new(ErrorKind::PermissionDenied, message));
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(&fd, LOCK, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|err| failed(err, format!("open the lock of the state directory {shown}")))?;
        take(&lock, sharing, path)?;
        let directory = Self { fd, shown: path.to_owned(), _lock: Some(lock) };
        if sharing == Sharing::Alone {
            directory.tidy()?;
        }
        Ok(directory)
    }

    /// Opens a directory that is there for something else, in which whoever calls this has one file that nobody else uses.
    ///
    /// # Errors
    /// What the system says.
    pub fn beside(path: &Path) -> Result<Self> {
        Ok(Self { fd: open_directory(path)?, shown: path.to_owned(), _lock: None })
    }

    /// How people call the file `name`.
    pub fn shown(&self, name: &str) -> String {
        self.shown.join(name).display().to_string()
    }

    /// The names of the files that end with `extension`, in alphabetical order.
    ///
    /// # Errors
    /// What the system says.
    pub fn names(&self, extension: &str) -> Result<Vec<String>> {
        let mut names = self.entries()?;
        names.retain(|name| !name.starts_with('.') && name.ends_with(extension));
        names.sort();
        Ok(names)
    }

    /// All names that are text.
    fn entries(&self) -> Result<Vec<String>> {
        let cannot = |err| failed(err, format!("list the state directory {}", self.shown.display()));
        let entries = rustix::fs::Dir::read_from(&self.fd).map_err(cannot)?;
        let mut names = Vec::new();
        for entry in entries {
            names.extend(entry.map_err(cannot)?.file_name().to_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    /// Removes what a write of the file `name` has left that was interrupted.
    pub fn clear(&self, name: &str) {
        // If it isn't there there is nothing to remove, and where it can't be removed it is in nobody's way.
        let _ = rustix::fs::unlinkat(&self.fd, temporary(name), AtFlags::empty());
    }

    /// As [`StateDir::clear`] for all files.
    fn tidy(&self) -> Result<()> {
        for name in self.entries()?.iter().filter(|name| is_temporary(name)) {
            // A file that can't be removed is in nobody's way.
            let _ = rustix::fs::unlinkat(&self.fd, name.as_str(), AtFlags::empty());
        }
        Ok(())
    }

    /// What is in the file `name`; none if there is none.
    ///
    /// # Errors
    /// If it is no regular file, or too long, and what the system says.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let shown = self.shown(name);
        let cannot = |err| failed(err, format!("read the state file {shown}"));
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match rustix::fs::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(err) => return Err(cannot(err)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(cannot)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{shown} is no regular file, so it is no state file"),
            ));
        }
        let mut bytes = Vec::new();
        let read = File::from(fd).take(MOST + 1).read_to_end(&mut bytes);
        read.map_err(|err| Error::from_io(err, format_args!("read the state file {shown}")))?;
        if bytes.len() as u64 > MOST {
            return Err(Error::new(ErrorKind::Corrupt, format!("{shown} is longer than any state file")));
        }
        Ok(Some(bytes))
    }

    /// Makes the file `name`, durably.
    ///
    /// # Errors
    /// `AlreadyExists`, and what the system says.
    pub fn create(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.put(name, bytes, RenameFlags::NOREPLACE)
    }

    /// Puts a new file in the place of `name`, durably; there need not be one.
    ///
    /// # Errors
    /// What the system says. What was there is still there.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.put(name, bytes, RenameFlags::empty())
    }

    fn put(&self, name: &str, bytes: &[u8], how: RenameFlags) -> Result<()> {
        let shown = self.shown(name);
        let temporary = temporary(name);
        let written = self.write(&temporary, bytes);
        let named = written.and_then(|()| match how {
            RenameFlags::NOREPLACE => self.rename_new(&temporary, name),
            _ => Ok(rustix::fs::renameat(&self.fd, temporary.as_str(), &self.fd, name)?),
        });
        if let Err(err) = named {
            // If it was never made there is nothing to remove.
            let _ = rustix::fs::unlinkat(&self.fd, temporary.as_str(), AtFlags::empty());
            return Err(Error::from_io(err, format_args!("write the state file {shown}")));
        }
        sync(&self.fd, &self.shown)
    }

    /// Makes the file `name` with these contents, durable but for its name.
    fn write(&self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR);
        let fd = match open() {
            // A write that was interrupted left it.
            Err(Errno::EXIST) => rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()).and_then(|()| open()),
            opened => opened,
        };
        let mut file = File::from(fd?);
        file.write_all(bytes)?;
        file.sync_all()
    }

    /// Renames, without replacing anything where the file system can promise that.
    fn rename_new(&self, from: &str, to: &str) -> std::io::Result<()> {
        match rustix::fs::renameat_with(&self.fd, from, &self.fd, to, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {
                if rustix::fs::statat(&self.fd, to, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                    return Err(Errno::EXIST.into());
                }
                Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?)
            }
            done => Ok(done?),
        }
    }

    /// Removes the file `name`, durably. That there is none is as good.
    ///
    /// # Errors
    /// What the system says.
    pub fn remove(&self, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) => sync(&self.fd, &self.shown),
            Err(Errno::NOENT) => Ok(()),
            Err(err) => Err(failed(err, format!("remove the state file {}", self.shown(name)))),
        }
    }
}

/// The name under which a file is written before it has its own.
fn temporary(name: &str) -> String {
    format!(".{}{UNFINISHED}", name.trim_start_matches('.'))
}

fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(UNFINISHED)
}

/// The directory that a path's last name is in.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn failed(err: Errno, what: String) -> Error {
    Error::from_io(err.into(), what)
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(CWD, path, flags, Mode::empty());
    opened.map_err(|err| failed(err, format!("open the directory {}", path.display())))
}

/// Makes the names in a directory durable.
fn sync(directory: &OwnedFd, path: &Path) -> Result<()> {
    match rustix::fs::fsync(directory) {
        // Not all file systems have durable directories; then nothing more can be done.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(err) => Err(failed(err, format!("make {} durable", path.display()))),
    }
}

fn take(lock: &OwnedFd, sharing: Sharing, path: &Path) -> Result<()> {
    let how = match sharing {
        Sharing::Alone => FlockOperation::NonBlockingLockExclusive,
        Sharing::Shared => FlockOperation::NonBlockingLockShared,
    };
    for attempt in 0.. {
        match rustix::fs::flock(lock, how) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) if attempt < ATTEMPTS => std::thread::sleep(PAUSE),
            Err(Errno::WOULDBLOCK) => {
                let message = format!(
                    "the state directory {} is in use by another headwater; end that, or give each its own",
                    path.display()
                );
                return Err(Error::new(ErrorKind::InUse, message));
            }
            Err(err) => return Err(failed(err, format!("lock the state directory {}", path.display()))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("state");
        (scratch, path)
    }

    #[test]
    fn files_are_made_replaced_and_removed() {
        let (_scratch, path) = scratch();
        let state = StateDir::open(&path, Sharing::Alone).unwrap();
        assert_eq!(state.read("a.job").unwrap(), None);
        state.create("a.job", b"one").unwrap();
        assert_eq!(state.create("a.job", b"two").unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(state.read("a.job").unwrap().as_deref(), Some(&b"one"[..]));
        state.replace("a.job", b"two").unwrap();
        state.replace("b.job", b"three").unwrap();
        assert_eq!(state.read("a.job").unwrap().as_deref(), Some(&b"two"[..]));
        assert_eq!(state.names(".job").unwrap(), ["a.job", "b.job"]);
        state.remove("a.job").unwrap();
        state.remove("a.job").unwrap();
        assert_eq!(state.names(".job").unwrap(), ["b.job"]);
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&path.join("b.job"))), (0o700, 0o600));
    }

    #[test]
    fn what_an_interrupted_write_left_is_cleared_away() {
        let (_scratch, path) = scratch();
        drop(StateDir::open(&path, Sharing::Alone).unwrap());
        std::fs::write(path.join(".a.job.headwater-new"), "half").unwrap();
        std::fs::write(path.join(".b.job.headwater-new"), "half").unwrap();
        let beside = StateDir::beside(&path).unwrap();
        beside.clear("b.job");
        assert!(path.join(".a.job.headwater-new").exists() && !path.join(".b.job.headwater-new").exists());
        std::fs::write(path.join(".b.job.headwater-new"), "half").unwrap();
        beside.create("a.job", b"whole").unwrap();
        assert_eq!(beside.read("a.job").unwrap().as_deref(), Some(&b"whole"[..]));
        let state = StateDir::open(&path, Sharing::Alone).unwrap();
        assert!(!path.join(".b.job.headwater-new").exists());
        assert_eq!(state.names(".job").unwrap(), ["a.job"]);
    }

    #[test]
    fn one_directory_has_one_user_or_several_who_share_it() {
        let (_scratch, path) = scratch();
        let shared = StateDir::open(&path, Sharing::Shared).unwrap();
        drop(StateDir::open(&path, Sharing::Shared).unwrap());
        let refused = StateDir::open(&path, Sharing::Alone).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        assert!(refused.to_string().contains(path.to_str().unwrap()));
        drop(shared);
        let _alone = StateDir::open(&path, Sharing::Alone).unwrap();
        assert_eq!(StateDir::open(&path, Sharing::Shared).unwrap_err().kind(), ErrorKind::InUse);
    }

    #[test]
    fn what_is_no_file_of_ours_is_refused() {
        let (scratch, path) = scratch();
        let state = StateDir::open(&path, Sharing::Alone).unwrap();
        std::fs::write(scratch.path().join("elsewhere"), "x").unwrap();
        std::os::unix::fs::symlink("../elsewhere", path.join("link.job")).unwrap();
        assert!(state.read("link.job").is_err());
        std::fs::create_dir(path.join("dir.job")).unwrap();
        assert_eq!(state.read("dir.job").unwrap_err().kind(), ErrorKind::Corrupt);
        rustix::fs::mknodat(CWD, path.join("fifo.job"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert_eq!(state.read("fifo.job").unwrap_err().kind(), ErrorKind::Corrupt);
        std::fs::File::create(path.join("long.job")).unwrap().set_len(MOST + 1).unwrap();
        assert_eq!(state.read("long.job").unwrap_err().kind(), ErrorKind::Corrupt);
        drop(state);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(StateDir::open(&path, Sharing::Alone).unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert_eq!(
            StateDir::open(Path::new("/nowhere/a/b"), Sharing::Alone).unwrap_err().kind(),
            ErrorKind::NotFound
        );
    }
}
