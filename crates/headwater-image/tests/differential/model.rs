//! What a disk must contain, in the simplest way.

use rand::Rng;
use rand::rngs::StdRng;

/// One request. Offsets and lengths are in bytes.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Write {
        offset: u64,
        len: u64,
        pattern: u8,
        /// By headwater. QEMU refuses to compress what is there already.
        compressed: bool,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    Read {
        offset: u64,
        len: u64,
    },
    Flush,
    Resize {
        size: u64,
    },
    /// Writes of disjoint ranges at once: (offset, length, pattern).
    Burst(Vec<(u64, u64, u8)>),
}

impl Request {
    /// A random request to a disk of `size` bytes.
    pub(crate) fn random(rng: &mut StdRng, size: u64, cluster: u64, resizable: bool) -> Self {
        let (offset, len) = range(rng, size, cluster);
        let pattern = rng.random_range(1..=255);
        match rng.random_range(0..100) {
            0..40 => Request::Write { offset, len, pattern, compressed: rng.random_bool(0.4) },
            40..55 => Request::Zero { offset, len, unmap: rng.random() },
            55..67 => Request::Discard { offset, len },
            67..80 => Request::Read { offset, len },
            80..84 => Request::Flush,
            84..88 if resizable => {
                let size = rng.random_range(0..=size + size / 2).next_multiple_of(512);
                Request::Resize { size: size.clamp(512, 16 << 20) }
            }
            _ => {
                let step = size / 8;
                let writes =
                    (0..8).filter(|_| rng.random_bool(0.7)).map(|i| (i * step, step)).collect::<Vec<_>>();
                let within = |(start, len): (u64, u64), rng: &mut StdRng| {
                    let (offset, len) = range(rng, len.max(1), cluster);
                    (start + offset, len, rng.random_range(1..=255))
                };
                Request::Burst(writes.into_iter().map(|part| within(part, rng)).collect())
            }
        }
    }

    /// The same for qemu-io.
    pub(crate) fn commands(&self) -> Vec<String> {
        match self {
            Request::Write { offset, len, pattern, .. } => vec![format!("write -P {pattern} {offset} {len}")],
            Request::Zero { offset, len, unmap } => {
                vec![format!("write -z {} {offset} {len}", if *unmap { "-u" } else { "" })]
            }
            Request::Discard { offset, len } => vec![format!("discard {offset} {len}")],
            Request::Read { .. } => Vec::new(),
            Request::Flush => vec!["flush".to_owned()],
            Request::Resize { size } => vec![format!("truncate {size}")],
            Request::Burst(writes) => writes
                .iter()
                .map(|(offset, len, pattern)| format!("write -P {pattern} {offset} {len}"))
                .collect(),
        }
    }
}

/// A range within `size` bytes: small ones, ones around cluster boundaries, long ones.
fn range(rng: &mut StdRng, size: u64, cluster: u64) -> (u64, u64) {
    let longest = match rng.random_range(0..10) {
        0..3 => 1000,
        3..8 => cluster * 3,
        _ => size / 2,
    };
    let mut offset = rng.random_range(0..size);
    let mut len = rng.random_range(1..=longest.max(1));
    match rng.random_range(0..4) {
        0 => {
            (offset, len) = (offset - offset % cluster, len.next_multiple_of(cluster));
        }
        1 => {
            (offset, len) = (offset - offset % 512, len.next_multiple_of(512));
        }
        _ => {}
    }
    (offset, len.min(size - offset))
}

/// The contents of a disk.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) bytes: Vec<u8>,
    /// True for bytes of which QEMU may have made something else: it may have kept what headwater discarded, or the other way.
    pub(crate) open: Vec<bool>,
}

impl Model {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { open: vec![false; bytes.len()], bytes }
    }

    pub(crate) fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        let range = offset as usize..(offset + len) as usize;
        self.bytes[range.clone()].fill(byte);
        self.open[range].fill(false);
    }

    pub(crate) fn resize(&mut self, size: u64, cluster: u64) {
        let old = self.bytes.len();
        self.bytes.resize(size as usize, 0);
        self.open.resize(size as usize, false);
        // QEMU lets old data in the last cluster show up again when a disk that had shrunk grows.
        let end = old.next_multiple_of(cluster as usize).min(size as usize);
        if old < end {
            self.open[old..end].fill(true);
        }
    }

    /// Takes over what a discarded range reads as: each byte as before, or zero.
    pub(crate) fn discarded(&mut self, offset: u64, found: &[u8]) {
        for (i, byte) in found.iter().enumerate() {
            let at = offset as usize + i;
            let old = self.bytes[at];
            assert!(
                *byte == old || *byte == 0,
                "the discarded byte at {at} reads {byte:#04x}, was {old:#04x}"
            );
            self.bytes[at] = *byte;
            self.open[at] = true;
        }
    }
}
