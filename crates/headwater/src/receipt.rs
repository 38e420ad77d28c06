//! What is said at the end of a stream that was verified: what was checked, against which manifest, and who gave wrong bytes.

use crate::mirrors::Mirrors;
use serde::Serialize;
use std::fmt;

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Receipt {
    /// Where the bytes came from: SOURCE and its mirrors.
    pub sources: Vec<String>,
    /// The root of the manifest.
    pub manifest_root: String,
    /// The size of the source's file, in bytes, and of a chunk of it.
    pub size: u64,
    /// See `size`.
    pub chunk_size: u32,
    /// Bytes that were checked in this run, those that were checked twice counted twice.
    pub bytes_checked: u64,
    /// Different chunks that were checked in this run. Those that the manifest says are zeroes needn't be.
    pub chunks_checked: u64,
    /// How many chunks there are.
    pub chunks: u64,
    /// Sources that gave wrong bytes; none of these was used.
    pub blamed: Vec<String>,
    /// The file that the data are in now.
    pub disk: String,
    /// Every byte of the disk that no client has written was verified before it was stored. False if the disk was begun without this manifest.
    pub verified_from_the_beginning: bool,
}

impl Receipt {
    /// Of a stream into `disk` that has ended well; none if nothing was verified. `whole`: nothing had been stored before without being verified.
    pub fn of(mirrors: &Mirrors, disk: &str, whole: bool) -> Option<Self> {
        let verification = mirrors.verification()?;
        let manifest = verification.manifest();
        Some(Self {
            sources: mirrors.all().to_vec(),
            manifest_root: mirrors.root()?,
            size: manifest.size(),
            chunk_size: manifest.chunk_size(),
            bytes_checked: verification.bytes(),
            chunks_checked: verification.chunks(),
            chunks: manifest.chunks(),
            blamed: verification.blamed(),
            disk: disk.to_owned(),
            verified_from_the_beginning: whole,
        })
    }
}

impl fmt::Display for Receipt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "receipt for {}", self.disk)?;
        writeln!(f, "  manifest root: {}", self.manifest_root)?;
        writeln!(f, "  sources: {}", self.sources.join(", "))?;
        writeln!(
            f,
            "  checked in this run: {} of {} chunks of {} bytes, {} bytes in all",
            self.chunks_checked, self.chunks, self.chunk_size, self.bytes_checked
        )?;
        let blamed = if self.blamed.is_empty() { "nobody".to_owned() } else { self.blamed.join(", ") };
        writeln!(f, "  gave wrong bytes, which were not used: {blamed}")?;
        f.write_str(if self.verified_from_the_beginning {
            "  every byte that no client has written was verified before it was stored"
        } else {
            "  what this run stored was verified before; what was there when it began was not"
        })
    }
}
