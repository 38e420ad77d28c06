//! A manifest: what a file must hold, as a BLAKE3 hash for each chunk of it. docs/manifest.md specifies the format.
//!
//! A manifest is read from somebody else's text: its lines are short or refused, memory follows what the text holds and not what it claims, and its
//! root, a hash over all that it says, is computed anew and compared.

use crate::error::{Error, ErrorKind, Result};
use crate::zero::is_zero;
use std::fmt::Write as _;
use std::io::{BufRead, Read, Write};

#[cfg(test)]
mod tests;

/// The first line.
const MAGIC: &str = "headwater-manifest 1";

/// What the root is the hash of something under, so that it is never the hash of anything else.
const CONTEXT: &str = "headwater 2026 manifest v1 root";

/// The bounds of the size of a chunk, in bytes; a power of two.
pub const CHUNK_SIZES: std::ops::RangeInclusive<u32> = 4096..=16 << 20;

/// The size that is chosen for files that aren't too large for it: a guest's miss costs a chunk, and hashing one takes a small part of a millisecond.
pub const DEFAULT_CHUNK: u32 = 256 << 10;

/// The most chunks that a manifest may have: 128 MiB of hashes.
pub const MOST_CHUNKS: u64 = 4 << 20;

/// The longest line, in bytes.
const LONGEST_LINE: u64 = 128;

/// A BLAKE3 hash.
pub type Hash = [u8; 32];

/// A run of chunks that hold zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Zeroes {
    start: u64,
    end: u64,
    /// How many chunks before it have a hash.
    hashes: u64,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    size: u64,
    chunk: u32,
    /// Of the chunks that don't hold zeroes, in their order.
    hashes: Vec<Hash>,
    zeroes: Vec<Zeroes>,
    root: Hash,
}

/// What is promised of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// Its bytes are zeroes.
    Zeroes,
    /// Its bytes have this hash.
    Hash(Hash),
}

/// The hash of a chunk, or [`Promise::Zeroes`] if it has nothing else.
pub fn promise_of(bytes: &[u8]) -> Promise {
    if is_zero(bytes) { Promise::Zeroes } else { Promise::Hash(*blake3::hash(bytes).as_bytes()) }
}

/// A hash as people read it.
pub fn hex(hash: &Hash) -> String {
    hash.iter().fold(String::with_capacity(64), |mut text, byte| {
        // Text takes everything.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn from_hex(text: &str) -> Option<Hash> {
    let text = text.as_bytes();
    if text.len() != 64 {
        return None;
    }
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut hash = [0; 32];
    for (byte, pair) in hash.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(hash)
}

/// A number as the format has it: digits alone, none too many.
fn number(text: &str) -> Option<u64> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

/// The size of chunk that suits a file of `size` bytes.
pub fn chunk_for(size: u64) -> u32 {
    let mut chunk = DEFAULT_CHUNK;
    while size.div_ceil(chunk.into()) > MOST_CHUNKS && chunk < *CHUNK_SIZES.end() {
        chunk *= 2;
    }
    chunk
}

/// Makes a manifest chunk by chunk.
#[derive(Debug)]
pub struct Builder {
    size: u64,
    chunk: u32,
    done: u64,
    hashes: Vec<Hash>,
    zeroes: Vec<Zeroes>,
}

impl Builder {
    /// Begins the manifest of a file of `size` bytes in chunks of `chunk` bytes.
    ///
    /// # Errors
    /// `InvalidInput` if chunks can't be so large, or would be too many.
    pub fn new(size: u64, chunk: u32) -> Result<Self> {
        let refuse = |why: String| Err(Error::new(ErrorKind::InvalidInput, why));
        if !chunk.is_power_of_two() || !CHUNK_SIZES.contains(&chunk) {
            return refuse(format!("a chunk of {chunk} bytes is not a power of two from 4096 to 16 MiB"));
        }
        let chunks = size.div_ceil(chunk.into());
        if chunks > MOST_CHUNKS {
            return refuse(format!(
                "{size} bytes make {chunks} chunks of {chunk} bytes, the most are {MOST_CHUNKS}"
            ));
        }
        Ok(Self { size, chunk, done: 0, hashes: Vec::new(), zeroes: Vec::new() })
    }

    /// How many chunks are still to come.
    pub fn missing(&self) -> u64 {
        self.size.div_ceil(self.chunk.into()) - self.done
    }

    /// Adds the next `count` chunks, if they are not too many.
    ///
    /// # Errors
    /// `Corrupt` if they are.
    pub fn push(&mut self, promise: Promise, count: u64) -> Result<()> {
        if count > self.missing() {
            let message = format!("there are more chunks than the size of {} bytes has", self.size);
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        match promise {
            Promise::Hash(hash) => self.hashes.extend(std::iter::repeat_n(hash, count as usize)),
            Promise::Zeroes => match self.zeroes.last_mut() {
                Some(last) if last.end == self.done => last.end += count,
                _ => {
                    let hashes = self.hashes.len() as u64;
                    self.zeroes.push(Zeroes { start: self.done, end: self.done + count, hashes });
                }
            },
        }
        self.done += count;
        Ok(())
    }

    /// The manifest.
    ///
    /// # Errors
    /// `Corrupt` if chunks are missing.
    pub fn finish(self) -> Result<Manifest> {
        if self.missing() > 0 {
            let message = format!("{} chunks are missing at the end", self.missing());
            return Err(Error::new(ErrorKind::Corrupt, message));
        }
        let Self { size, chunk, hashes, zeroes, .. } = self;
        let mut manifest = Manifest { size, chunk, hashes, zeroes, root: [0; 32] };
        manifest.root = manifest.compute_root();
        Ok(manifest)
    }
}

impl Manifest {
    /// The file's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The size of a chunk in bytes; the last may be shorter.
    pub fn chunk_size(&self) -> u32 {
        self.chunk
    }

    /// How many chunks there are.
    pub fn chunks(&self) -> u64 {
        self.size.div_ceil(self.chunk.into())
    }

    /// The hash over all that it says.
    pub fn root(&self) -> &Hash {
        &self.root
    }

    /// The first chunk after the run of zero chunks, or of others, that `chunk` is in; and whether it is one of zeroes.
    pub fn run(&self, chunk: u64) -> (bool, u64) {
        let at = self.zeroes.partition_point(|zeroes| zeroes.end <= chunk);
        match self.zeroes.get(at) {
            Some(zeroes) if zeroes.start <= chunk => (true, zeroes.end),
            Some(zeroes) => (false, zeroes.start),
            None => (false, self.chunks()),
        }
    }

    /// What is promised of a chunk; none past the end.
    pub fn promise(&self, chunk: u64) -> Option<Promise> {
        if chunk >= self.chunks() {
            return None;
        }
        let at = self.zeroes.partition_point(|zeroes| zeroes.end <= chunk);
        let hash = match (self.zeroes.get(at), at.checked_sub(1).map(|before| self.zeroes[before])) {
            (Some(zeroes), _) if zeroes.start <= chunk => return Some(Promise::Zeroes),
            (_, Some(before)) => before.hashes + (chunk - before.end),
            (_, None) => chunk,
        };
        self.hashes.get(hash as usize).copied().map(Promise::Hash)
    }

    /// Does not depend on how zeroes are written down: they count by the marker that stands for them.
    fn compute_root(&self) -> Hash {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&self.size.to_le_bytes());
        hasher.update(&self.chunk.to_le_bytes());
        let mut at = 0;
        let mut hashes = self.hashes.iter();
        while at < self.chunks() {
            let (zero, end) = self.run(at);
            if zero {
                hasher.update(b"zero");
                hasher.update(&at.to_le_bytes());
                hasher.update(&end.to_le_bytes());
            } else {
                hasher.update(b"hash");
                for hash in hashes.by_ref().take((end - at) as usize) {
                    hasher.update(hash);
                }
            }
            at = end;
        }
        *hasher.finalize().as_bytes()
    }

    /// Writes it as text.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, mut out: impl Write) -> std::io::Result<()> {
        writeln!(out, "{MAGIC}")?;
        writeln!(out, "size {}", self.size)?;
        writeln!(out, "chunk {}", self.chunk)?;
        writeln!(out, "root {}", hex(&self.root))?;
        let mut at = 0;
        let mut hashes = self.hashes.iter();
        while at < self.chunks() {
            let (zero, end) = self.run(at);
            if zero {
                writeln!(out, "zero {}", end - at)?;
            } else {
                for hash in hashes.by_ref().take((end - at) as usize) {
                    writeln!(out, "{}", hex(hash))?;
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Reads what [`Manifest::write`] wrote; `shown` is how people call it.
    ///
    /// # Errors
    /// `Corrupt` if it is something else or damaged, `Unsupported` if it has another version, and what reading says.
    pub fn read(text: impl BufRead, shown: &str) -> Result<Self> {
        let mut lines = Lines { text, number: 0 };
        let manifest = lines.manifest();
        manifest.map_err(|err| err.context(format_args!("{shown}: line {}", lines.number)))
    }
}

struct Lines<T> {
    text: T,
    number: u64,
}

impl<T: BufRead> Lines<T> {
    /// The next line without its end; none at the end of the text.
    fn next(&mut self) -> Result<Option<String>> {
        self.number += 1;
        let mut line = Vec::new();
        let read = (&mut self.text).take(LONGEST_LINE).read_until(b'\n', &mut line);
        let read = read.map_err(|err| Error::from_io(err, "read the manifest"))?;
        if read == 0 {
            return Ok(None);
        }
        if line.pop() != Some(b'\n') {
            return Err(corrupt("the line has no end: the manifest is cut off, or it is none"));
        }
        String::from_utf8(line).map(Some).map_err(|_| corrupt("the line is not text"))
    }

    fn field(&mut self, name: &str) -> Result<String> {
        let line = self.next()?;
        let value = line.as_deref().and_then(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map(str::to_owned).ok_or_else(|| corrupt(&format!("it should be \"{name} ...\"")))
    }

    fn manifest(&mut self) -> Result<Manifest> {
        match self.next()? {
            Some(line) if line == MAGIC => {}
            Some(line) if line.starts_with("headwater-manifest ") => {
                let message =
                    format!("it is of another version than \"{MAGIC}\"; use the headwater that made it");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            _ => return Err(corrupt(&format!("it is no manifest: it doesn't begin with \"{MAGIC}\""))),
        }
        let size = number(&self.field("size")?).ok_or_else(|| corrupt("the size is no number"))?;
        let chunk = number(&self.field("chunk")?).and_then(|chunk| u32::try_from(chunk).ok());
        let chunk = chunk.ok_or_else(|| corrupt("the size of a chunk is no number"))?;
        let root = from_hex(&self.field("root")?).ok_or_else(|| corrupt("the root is no hash"))?;
        let mut builder =
            Builder::new(size, chunk).map_err(|err| Error::new(ErrorKind::Corrupt, err.to_string()))?;
        while let Some(line) = self.next()? {
            let (promise, count) = match line.strip_prefix("zero ") {
                Some(count) => (Promise::Zeroes, number(count).filter(|count| *count > 0)),
                None => match from_hex(&line) {
                    Some(hash) => (Promise::Hash(hash), Some(1)),
                    None => return Err(corrupt("it is neither a hash nor \"zero COUNT\"")),
                },
            };
            builder.push(promise, count.ok_or_else(|| corrupt("the count is no number"))?)?;
        }
        let manifest = builder.finish()?;
        if manifest.root != root {
            return Err(corrupt(&format!(
                "the root is {} and what the manifest says has {}: it is damaged, or was changed",
                hex(&root),
                hex(&manifest.root)
            )));
        }
        Ok(manifest)
    }
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}
