//! Reads of what is in the page cache, where they are asked for.
//!
//! Such a read is a copy of memory. To hand it to a worker and to hear of its end costs several times as much: two threads are woken for it.
//! So it is first asked for with RWF_NOWAIT, which gives what is there and waits for no device. What isn't there goes on to a worker.

use super::op::OpenFile;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::io::IoSliceMut;

/// The longest read that is done in place, in bytes. Copying more would keep the thread from others for too long (20 us for this much).
const MAX: usize = 256 << 10;

/// Fills the start of `buf` with what the page cache has from `offset` on, and gives how many bytes that are. Waits for nothing.
pub(super) fn read(file: &OpenFile, offset: u64, buf: &mut [u8]) -> usize {
    if !file.tells_cached.get() || buf.len() > MAX {
        return 0;
    }
    match preadv2(&file.fd, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
        Ok(count) => count,
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            file.tells_cached.set(false);
            0
        }
        // It isn't there (EAGAIN); or something is wrong with the file, which a worker will meet as well.
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::scratch_file;
    use super::*;
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn it_gives_what_was_just_written_and_leaves_the_rest_alone() {
        let scratch = scratch_file();
        let file = scratch.as_file();
        let open = OpenFile::new(OwnedFd::from(File::try_clone(file).unwrap()), 1, 1);
        let bytes: Vec<u8> = (0..5000).map(|i| i as u8 | 1).collect();
        file.write_all_at(&bytes, 100).unwrap();
        let mut buf = [0; 6000];
        let count = read(&open, 100, &mut buf);
        // A file system may not tell at all.
        assert!(count == 0 || count == 5000, "{count}");
        assert_eq!(buf[..count], bytes[..count]);
        assert!(buf[count..].iter().all(|byte| *byte == 0));
        assert_eq!(read(&open, 5100, &mut buf), 0, "the end of the file");
        assert_eq!(read(&open, 0, &mut vec![0; MAX + 1]), 0, "too long");
    }
}
