//! Whether it is still the same file: while it is open, and when it is opened another time.

use super::node::FileNode;
use super::open::Kind;
use crate::file_system::FileSystem;
use headwater_block::{Error, ErrorKind, Identity, Result};
use rustix::fs::{AtFlags, StatxFlags, fstat, fsync, statx};

impl FileNode {
    /// Refuses to go on with a file that is open for reading only and was made shorter by somebody else: what is missing would read as
    /// zeroes, and be taken for the truth.
    pub(super) fn check_length(&self) -> Result<()> {
        if !self.options.read_only || self.kind == Kind::BlockDevice {
            return Ok(());
        }
        let stat = fstat(&self.file.fd)
            .map_err(|err| Error::from_io(err.into(), format_args!("ask for the size of {}", self.name)))?;
        let (now, then) = (u64::try_from(stat.st_size).unwrap_or(0), self.size.get());
        if now >= then {
            return Ok(());
        }
        let message = format!(
            "{}: it had {then} bytes when it was opened, and was made shorter, to {now}, while it is in use; \
             restore it and start again",
            self.name
        );
        Err(Error::new(ErrorKind::SourceChanged, message))
    }

    /// Makes the times of a file durable that was written not long ago: a flush of its data leaves them out, and what a power cut sets back would look like
    /// another change. Waits for the disk.
    ///
    /// # Errors
    /// What the system says.
    pub fn sync_times(&self) -> Result<()> {
        fsync(&self.file.fd).map_err(|err| {
            Error::from_io(err.into(), format_args!("make the times of {} durable", self.name))
        })
    }

    /// Where it lies, for asking how much room is left there; none for a block device.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn file_system(&self) -> Result<Option<FileSystem>> {
        if self.kind == Kind::BlockDevice {
            return Ok(None);
        }
        let fd = rustix::io::fcntl_dupfd_cloexec(&self.file.fd, 0)
            .map_err(|err| Error::from_io(err.into(), format_args!("ask where {} lies", self.name)))?;
        Ok(Some(FileSystem::of_open(fd, self.name.clone())))
    }

    /// The contents of a regular file are known by the time of their last change, the file itself by its inode and the time of its birth; not
    /// by its device, whose number another boot may give to another. A block device has none of these.
    pub(super) fn marks(&self) -> Result<Identity> {
        if self.kind == Kind::BlockDevice {
            return Ok(Identity::default());
        }
        let wanted = StatxFlags::MTIME | StatxFlags::INO | StatxFlags::BTIME;
        let stat = statx(&self.file.fd, "", AtFlags::EMPTY_PATH, wanted)
            .map_err(|err| Error::from_io(err.into(), format_args!("ask for the times of {}", self.name)))?;
        // As `date -d` reads it.
        let time = |time: rustix::fs::StatxTimestamp| format!("@{}.{:09}", time.tv_sec, time.tv_nsec);
        let mut object = vec![("inode", stat.stx_ino.to_string())];
        if stat.stx_mask & StatxFlags::BTIME.bits() != 0 {
            object.push(("time of birth", time(stat.stx_btime)));
        }
        Ok(Identity { contents: vec![("time of modification", time(stat.stx_mtime))], object })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{on_runtime, scratch_file};
    use super::super::{Cache, Engine, FileNode, FileOptions, IoMode};
    use headwater_block::{Buffer, Identity, Node, WriteFlags};
    use std::path::Path;

    fn marks(path: &Path) -> Identity {
        on_runtime(async {
            let engine = Engine::new(IoMode::Threads).unwrap();
            let options = FileOptions { read_only: true, ..FileOptions::default() };
            FileNode::open(&engine, path, options).unwrap().identity().unwrap()
        })
    }

    #[test]
    fn a_file_is_known_again_and_a_change_of_it_is_seen() {
        let file = scratch_file();
        std::fs::write(file.path(), vec![1; 8192]).unwrap();
        let first = marks(file.path());
        assert!(!first.contents.is_empty() && !first.object.is_empty());
        assert_eq!(marks(file.path()), first);
        // The times of a file are as fine as the kernel's ticks.
        std::thread::sleep(std::time::Duration::from_millis(20));
        on_runtime(async {
            let engine = Engine::new(IoMode::Threads).unwrap();
            let options = FileOptions { cache: Cache::Buffered, ..FileOptions::default() };
            let node = FileNode::open(&engine, file.path(), options).unwrap();
            node.write(0, Buffer::copy_of(&[2]), WriteFlags::default()).await.unwrap();
            node.sync_times().unwrap();
        });
        let changed = marks(file.path());
        assert!(changed.contents != first.contents && changed.object == first.object);
        // A copy with its times is another file with the same contents.
        let copy = scratch_file();
        std::fs::copy(file.path(), copy.path()).unwrap();
        let modified = file.as_file().metadata().unwrap().modified().unwrap();
        copy.as_file().set_modified(modified).unwrap();
        let copied = marks(copy.path());
        assert!(copied.contents == changed.contents && copied.object != changed.object);
    }
}
