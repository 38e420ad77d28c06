//! Whether it is still the same file: while it is open, and when it is opened another time.

use super::node::FileNode;
use super::open::Kind;
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
