//! The memory of the data plane, as the broker reads it: names and addresses that a system call was given.

use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Longest path with its final zero, in bytes.
const PATH_MAX: usize = 4096;

/// No read crosses such a boundary needlessly: what follows a name may not be mapped.
const PAGE: u64 = 4096;

/// The memory of one process: its `/proc/self/mem`, opened by itself for reading.
pub(crate) struct Memory(File);

impl Memory {
    pub(crate) fn new(file: File) -> Self {
        Self(file)
    }

    /// `len` bytes at `address`. Errors: `FAULT` if they aren't all there.
    pub(crate) fn bytes(&self, address: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, address).map_err(|_| Errno::FAULT)?;
        Ok(bytes)
    }

    /// The path that ends with a zero and begins at `address`. Errors: `FAULT`, and `NAMETOOLONG`.
    pub(crate) fn path(&self, address: u64) -> Result<PathBuf, Errno> {
        let mut path = Vec::new();
        while path.len() < PATH_MAX {
            let at = address.checked_add(path.len() as u64).ok_or(Errno::FAULT)?;
            let piece = self.bytes(at, (PAGE - at % PAGE) as usize)?;
            match piece.iter().position(|byte| *byte == 0) {
                Some(end) if path.len() + end < PATH_MAX => {
                    path.extend_from_slice(&piece[..end]);
                    return Ok(PathBuf::from(OsString::from_vec(path)));
                }
                Some(_) => break,
                None => path.extend_from_slice(&piece),
            }
        }
        Err(Errno::NAMETOOLONG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Memory {
        Memory::new(File::open("/proc/self/mem").unwrap())
    }

    #[test]
    fn a_path_ends_at_its_zero() {
        let mut text = vec![b'x'; 3 * PATH_MAX];
        let memory = own();
        let path = |bytes: &[u8]| memory.path(bytes.as_ptr() as u64);
        assert_eq!(path(&text), Err(Errno::NAMETOOLONG));
        text[PATH_MAX] = 0;
        assert_eq!(path(&text), Err(Errno::NAMETOOLONG));
        text[PATH_MAX - 1] = 0;
        assert_eq!(path(&text).unwrap().as_os_str().len(), PATH_MAX - 1);
        assert_eq!(path(b"/a/b\0c"), Ok(PathBuf::from("/a/b")));
        assert_eq!(path(b"\0"), Ok(PathBuf::new()));
    }

    #[test]
    fn what_is_not_there_is_a_fault() {
        for address in [0, 1, u64::MAX, u64::MAX - 8, 1 << 63] {
            assert_eq!(own().path(address), Err(Errno::FAULT), "{address:#x}");
            assert_eq!(own().bytes(address, 16), Err(Errno::FAULT), "{address:#x}");
        }
    }
}
