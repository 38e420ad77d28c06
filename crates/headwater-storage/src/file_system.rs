//! How much room there is where a file lies.

use headwater_block::{Error, Result};
use rustix::fs::{FileType, Mode, OFlags};
use std::os::fd::OwnedFd;
use std::path::Path;

/// The file system of a file.
pub struct FileSystem {
    fd: OwnedFd,
    name: String,
}

impl FileSystem {
    /// Of the regular file at `path`; none for others (a block device has all the room that it will ever have).
    ///
    /// # Errors
    /// What the system says.
    pub fn of(path: &Path) -> Result<Option<Self>> {
        let name = path.display().to_string();
        let cannot = |err: rustix::io::Errno| Error::from_io(err.into(), format_args!("look at {name}"));
        let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(cannot)?;
        let stat = rustix::fs::fstat(&fd).map_err(cannot)?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        Ok(regular.then_some(Self { fd, name }))
    }

    /// Of the file that is open.
    pub(crate) fn of_open(fd: OwnedFd, name: String) -> Self {
        Self { fd, name }
    }

    /// Bytes that are free for whoever isn't root.
    ///
    /// # Errors
    /// What the system says.
    pub fn free(&self) -> Result<u64> {
        let stat = self.stat()?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Its size in bytes.
    ///
    /// # Errors
    /// What the system says.
    pub fn size(&self) -> Result<u64> {
        let stat = self.stat()?;
        Ok(stat.f_blocks.saturating_mul(stat.f_frsize))
    }

    fn stat(&self) -> Result<rustix::fs::StatVfs> {
        rustix::fs::fstatvfs(&self.fd).map_err(|err| {
            Error::from_io(err.into(), format_args!("ask how much room there is for {}", self.name))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_some_room_and_a_directory_none_of_its_own() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let system = FileSystem::of(file.path()).unwrap().unwrap();
        assert!(system.free().unwrap() <= system.size().unwrap() && system.size().unwrap() > 0);
        assert!(FileSystem::of(Path::new("/")).unwrap().is_none());
        assert!(FileSystem::of(Path::new("/none/there")).is_err());
    }
}
