//! Which headers requests and replies have: what two peers agree on first, and both need to find their way in the stream of bytes.

/// Each has what the one before it has, and more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Headers {
    /// Compact requests (28 bytes) and simple replies: no block status, no holes in a read.
    #[default]
    Simple,
    /// Compact requests, and replies in chunks (20 bytes) where they bring more than success.
    Structured,
    /// Requests and chunks of 32 bytes: lengths of 64 bits, and nothing but chunks.
    Extended,
}

impl Headers {
    /// Whether a reply may come in chunks.
    pub fn are_structured(self) -> bool {
        self >= Self::Structured
    }

    /// Whether requests and chunks have 32 bytes.
    pub fn are_extended(self) -> bool {
        self == Self::Extended
    }
}

/// The longest beginning of a message that is made in one piece: an extended chunk and the range of a hole.
const LONGEST: usize = 44;

/// The fixed beginning of a message, encoded. It is short, and lives where it is made.
#[derive(Clone, Copy, Debug)]
pub struct Encoded {
    bytes: [u8; LONGEST],
    len: u8,
}

impl Default for Encoded {
    /// Nothing.
    fn default() -> Self {
        Self { bytes: [0; LONGEST], len: 0 }
    }
}

impl Encoded {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Appends a field. All fields of one message fit.
    #[must_use]
    pub(crate) fn with<const N: usize>(mut self, field: [u8; N]) -> Self {
        let start = usize::from(self.len);
        self.bytes[start..start + N].copy_from_slice(&field);
        self.len += N as u8;
        self
    }
}

impl std::ops::Deref for Encoded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}
