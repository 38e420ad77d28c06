//! The bytes of requests, which lie in the kernel's memory until the server copies them.

use crate::abi::data_offset;
use rustix::io::{pread, pwrite};
use std::fs::File;
use std::io;
use std::rc::Rc;

/// Moves the bytes of requests that arrived and aren't answered. Never waits.
#[derive(Clone, Debug)]
pub struct DataPort(Rc<File>);

impl DataPort {
    pub(crate) fn new(device: Rc<File>) -> Self {
        Self(device)
    }

    /// Fills `into` with what the request with this tag wants written.
    ///
    /// # Errors
    /// If it has fewer bytes, isn't one that writes, or the device is gone.
    pub fn take(&self, tag: u16, into: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < into.len() {
            match pread(&*self.0, &mut into[at..], data_offset(tag, at as u32))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                copied => at += copied,
            }
        }
        Ok(())
    }

    /// Gives the request with this tag what it reads.
    ///
    /// # Errors
    /// If it wants fewer bytes, isn't one that reads, or the device is gone.
    pub fn give(&self, tag: u16, bytes: &[u8]) -> io::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            match pwrite(&*self.0, &bytes[at..], data_offset(tag, at as u32))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                copied => at += copied,
            }
        }
        Ok(())
    }
}
