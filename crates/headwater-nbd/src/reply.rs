//! Replies: simple ones, and the chunks of structured ones.
//!
//! A simple reply is 16 bytes, followed by the data if it answers a read without error. A structured reply is one or
//! more chunks of 20 bytes and a payload; the last has the DONE flag. Which of the two a reply is, its magic tells; a
//! server that negotiated structured replies may still send simple ones for commands other than reads.

mod coverage;

pub use coverage::ReadCoverage;

use crate::error::{ErrorCode, ProtocolError, printable};
use crate::wire::{self, Reader};

/// Longest payload of an error chunk that is taken, and of a block status chunk that is sent, in bytes. The latter then has
/// at most 131,071 extents.
pub const MAX_CONTROL_PAYLOAD: u32 = 1 << 20;

/// Longest payload of a block status chunk that is taken from a server, in bytes: 1,048,576 extents, the most that nbdkit sends.
pub const MAX_STATUS_PAYLOAD: u32 = (8 << 20) + 4;

/// The fixed part of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// The whole answer to a request. If it answers a read and there is no error, all data of the read follow.
    Simple {
        /// Which request.
        cookie: u64,
        /// What went wrong, if anything.
        error: Option<ErrorCode>,
    },
    /// A part of an answer; its payload follows.
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// Length of an encoded simple reply, without data.
    pub const SIMPLE_LEN: usize = 16;
    /// Length of an encoded chunk, without its payload.
    pub const CHUNK_LEN: usize = 20;

    /// The header at the front of `input` and how many bytes it takes; `None` when `input` is too short for it.
    ///
    /// `structured` says whether structured replies were negotiated, `max_data` how long a data chunk may be (the
    /// longest read that the caller sends).
    ///
    /// # Errors
    /// [`ProtocolError`] if this is no reply, or a chunk that breaks the protocol: the connection is lost.
    pub fn decode(
        input: &[u8],
        structured: bool,
        max_data: u32,
    ) -> Result<Option<(Self, usize)>, ProtocolError> {
        let mut reader = Reader::new(input);
        let Some(magic) = reader.u32() else { return Ok(None) };
        match magic {
            wire::SIMPLE_REPLY => {
                let (Some(error), Some(cookie)) = (reader.u32(), reader.u64()) else { return Ok(None) };
                Ok(Some((Self::Simple { cookie, error: ErrorCode::from_wire(error) }, Self::SIMPLE_LEN)))
            }
            wire::CHUNK if structured => {
                let fields = (reader.u16(), reader.u16(), reader.u64(), reader.u32());
                let (Some(flags), Some(kind), Some(cookie), Some(length)) = fields else { return Ok(None) };
                let chunk = ChunkHeader::from_wire(flags, kind, cookie, length, max_data)?;
                Ok(Some((Self::Chunk(chunk), Self::CHUNK_LEN)))
            }
            found => Err(ProtocolError::BadMagic {
                what: "a reply",
                found: found.into(),
                expected: if structured { wire::CHUNK } else { wire::SIMPLE_REPLY }.into(),
            }),
        }
    }

    /// Which request this belongs to.
    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } => *cookie,
            Self::Chunk(chunk) => chunk.cookie,
        }
    }
}

/// What a chunk's payload holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// Nothing; the request succeeded.
    None,
    /// An offset ([`decode_data_offset`]) and data.
    OffsetData,
    /// A range that reads as zeroes ([`decode_hole`]).
    OffsetHole,
    /// Extents of one context ([`decode_block_status`]).
    BlockStatus,
    /// The request failed ([`decode_error`]). Also stands for error types that this crate does not know, which have
    /// the same beginning.
    Error,
    /// The request failed at a certain offset ([`decode_error`]).
    ErrorOffset,
}

const DONE: u16 = 1;
const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_ERROR: u16 = 1 << 15 | 1;
const TYPE_ERROR_OFFSET: u16 = 1 << 15 | 2;

/// Length of the offset before the data of an [`ChunkKind::OffsetData`] chunk.
pub const DATA_OFFSET_LEN: usize = 8;

/// The fixed part of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// What the payload holds.
    pub kind: ChunkKind,
    /// Whether this is the last chunk of the answer.
    pub done: bool,
    /// Which request.
    pub cookie: u64,
    /// Length of the payload. Already checked: within the limits, and possible for `kind`.
    pub length: u32,
}

impl ChunkHeader {
    fn from_wire(
        flags: u16,
        code: u16,
        cookie: u64,
        length: u32,
        max_data: u32,
    ) -> Result<Self, ProtocolError> {
        const WHAT: &str = "a reply chunk";
        let kind = match code {
            TYPE_NONE => ChunkKind::None,
            TYPE_OFFSET_DATA => ChunkKind::OffsetData,
            TYPE_OFFSET_HOLE => ChunkKind::OffsetHole,
            TYPE_BLOCK_STATUS => ChunkKind::BlockStatus,
            TYPE_ERROR_OFFSET => ChunkKind::ErrorOffset,
            _ if code & (1 << 15) != 0 => ChunkKind::Error,
            _ => return Err(ProtocolError::malformed(WHAT, format!("unknown type {code}"))),
        };
        let (shortest, longest) = match kind {
            ChunkKind::None => (0, 0),
            // At least one byte of data.
            ChunkKind::OffsetData => (9, max_data.saturating_add(8)),
            ChunkKind::OffsetHole => (12, 12),
            // A context and at least one extent.
            ChunkKind::BlockStatus => (12, MAX_STATUS_PAYLOAD),
            ChunkKind::Error => (6, MAX_CONTROL_PAYLOAD),
            ChunkKind::ErrorOffset => (14, MAX_CONTROL_PAYLOAD),
        };
        if length > longest {
            return Err(ProtocolError::TooLong { what: WHAT, length: length.into(), limit: longest.into() });
        }
        if length < shortest {
            let why = format!("{kind:?} with {length} bytes, expected at least {shortest}");
            return Err(ProtocolError::malformed(WHAT, why));
        }
        Ok(Self { kind, done: flags & DONE != 0, cookie, length })
    }

    /// How many bytes of data a data chunk carries after its offset; zero for other chunks.
    pub fn data_len(&self) -> u32 {
        match self.kind {
            ChunkKind::OffsetData => self.length.saturating_sub(8),
            _ => 0,
        }
    }

    /// The bytes for the wire; the payload follows them.
    pub fn encode(&self) -> [u8; ReplyHeader::CHUNK_LEN] {
        let code = match self.kind {
            ChunkKind::None => TYPE_NONE,
            ChunkKind::OffsetData => TYPE_OFFSET_DATA,
            ChunkKind::OffsetHole => TYPE_OFFSET_HOLE,
            ChunkKind::BlockStatus => TYPE_BLOCK_STATUS,
            ChunkKind::Error => TYPE_ERROR,
            ChunkKind::ErrorOffset => TYPE_ERROR_OFFSET,
        };
        let mut bytes = [0; ReplyHeader::CHUNK_LEN];
        bytes[..4].copy_from_slice(&wire::CHUNK.to_be_bytes());
        bytes[4..6].copy_from_slice(&(if self.done { DONE } else { 0 }).to_be_bytes());
        bytes[6..8].copy_from_slice(&code.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }
}

/// The offset on the export at which the data of an [`ChunkKind::OffsetData`] chunk begin; they follow these bytes.
pub fn decode_data_offset(payload: [u8; DATA_OFFSET_LEN]) -> u64 {
    u64::from_be_bytes(payload)
}

/// A range that reads as zeroes, from the payload of an [`ChunkKind::OffsetHole`] chunk: offset and length.
///
/// # Errors
/// [`ProtocolError::Malformed`] if the payload has another length or the range is empty.
pub fn decode_hole(payload: &[u8]) -> Result<(u64, u32), ProtocolError> {
    let mut reader = Reader::new(payload);
    match (reader.u64(), reader.u32(), reader.is_empty()) {
        (Some(offset), Some(length), true) if length > 0 => Ok((offset, length)),
        _ => Err(ProtocolError::malformed("a hole chunk", format!("payload {payload:02x?}"))),
    }
}

/// One run of bytes of a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length in bytes, not zero.
    pub length: u32,
    /// Meaning depends on the context: for `base:allocation` [`STATE_HOLE`] and [`STATE_ZERO`], for
    /// `qemu:allocation-depth` the depth (0: unallocated, 1: the top layer, and so on).
    pub flags: u32,
}

/// `base:allocation`: no storage behind the extent.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: the extent reads as zeroes.
pub const STATE_ZERO: u32 = 2;

/// The payload of an [`ChunkKind::BlockStatus`] chunk: the context's id, and extents that begin at the request's
/// offset and follow each other. Their sum may be shorter than the request, and the last may reach beyond it.
///
/// # Errors
/// [`ProtocolError::Malformed`] if the payload is no whole number of extents, or one of them is empty.
pub fn decode_block_status(payload: &[u8]) -> Result<(u32, Vec<StatusExtent>), ProtocolError> {
    const WHAT: &str = "a block status chunk";
    let mut reader = Reader::new(payload);
    let context = reader.u32().ok_or_else(|| ProtocolError::malformed(WHAT, "no context"))?;
    let mut extents = Vec::with_capacity(payload.len() / 8);
    while !reader.is_empty() {
        match (reader.u32(), reader.u32()) {
            (Some(length), Some(flags)) if length > 0 => extents.push(StatusExtent { length, flags }),
            (Some(0), _) => return Err(ProtocolError::malformed(WHAT, "an extent without length")),
            _ => return Err(ProtocolError::malformed(WHAT, "half an extent at its end")),
        }
    }
    if extents.is_empty() {
        return Err(ProtocolError::malformed(WHAT, "no extent"));
    }
    Ok((context, extents))
}

/// An error chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk {
    /// What went wrong.
    pub code: ErrorCode,
    /// The server's own words; may be empty. Control characters are replaced.
    pub message: String,
    /// Where it went wrong, for [`ChunkKind::ErrorOffset`].
    pub offset: Option<u64>,
}

/// The payload of an [`ChunkKind::Error`] or [`ChunkKind::ErrorOffset`] chunk.
///
/// # Errors
/// [`ProtocolError::Malformed`] if lengths don't fit or the code says "no error".
pub fn decode_error(kind: ChunkKind, payload: &[u8]) -> Result<ErrorChunk, ProtocolError> {
    const WHAT: &str = "an error chunk";
    let mut reader = Reader::new(payload);
    let (Some(code), Some(length)) = (reader.u32(), reader.u16()) else {
        return Err(ProtocolError::malformed(WHAT, "shorter than its fixed part"));
    };
    let code = ErrorCode::from_wire(code).ok_or_else(|| ProtocolError::malformed(WHAT, "error code 0"))?;
    let message = reader.bytes(length.into());
    let message = message.ok_or_else(|| ProtocolError::malformed(WHAT, "message longer than the chunk"))?;
    let offset = match kind {
        ChunkKind::ErrorOffset => {
            Some(reader.u64().ok_or_else(|| ProtocolError::malformed(WHAT, "the offset is missing"))?)
        }
        _ => None,
    };
    Ok(ErrorChunk { code, message: printable(message), offset })
}

/// A simple reply for the wire; the data of a read follow it.
pub fn encode_simple(cookie: u64, error: Option<ErrorCode>) -> [u8; ReplyHeader::SIMPLE_LEN] {
    let mut bytes = [0; ReplyHeader::SIMPLE_LEN];
    bytes[..4].copy_from_slice(&wire::SIMPLE_REPLY.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.map_or(0, ErrorCode::to_wire).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// Chunk header and offset of a data chunk; `length` bytes of data (not zero, at most `u32::MAX - 8`) follow it.
pub fn encode_data_prefix(cookie: u64, offset: u64, length: u32, done: bool) -> [u8; 28] {
    let length = length.saturating_add(8);
    let header = ChunkHeader { kind: ChunkKind::OffsetData, done, cookie, length }.encode();
    let mut bytes = [0; 28];
    bytes[..20].copy_from_slice(&header);
    bytes[20..].copy_from_slice(&offset.to_be_bytes());
    bytes
}

/// A whole hole chunk: `length` bytes (not zero) at `offset` read as zeroes.
pub fn encode_hole(cookie: u64, offset: u64, length: u32, done: bool) -> [u8; 32] {
    let header = ChunkHeader { kind: ChunkKind::OffsetHole, done, cookie, length: 12 }.encode();
    let mut bytes = [0; 32];
    bytes[..20].copy_from_slice(&header);
    bytes[20..28].copy_from_slice(&offset.to_be_bytes());
    bytes[28..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// A whole chunk without payload that ends a successful answer.
pub fn encode_done(cookie: u64) -> [u8; ReplyHeader::CHUNK_LEN] {
    ChunkHeader { kind: ChunkKind::None, done: true, cookie, length: 0 }.encode()
}

/// Appends a whole error chunk to `out`, the last of its answer. Of `message` at most 4096 bytes are sent.
pub fn encode_error(out: &mut Vec<u8>, cookie: u64, code: ErrorCode, message: &str) {
    let mut end = message.len().min(4096);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    // `end` is at most 4096, so neither cast loses anything.
    let header = ChunkHeader { kind: ChunkKind::Error, done: true, cookie, length: 6 + end as u32 }.encode();
    out.extend_from_slice(&header);
    out.extend_from_slice(&code.to_wire().to_be_bytes());
    out.extend_from_slice(&(end as u16).to_be_bytes());
    out.extend_from_slice(&message.as_bytes()[..end]);
}

/// Appends a whole block status chunk to `out`. `extents` must not be empty; those that would take the payload over
/// [`MAX_CONTROL_PAYLOAD`] are left out, which the protocol allows (the client asks again).
pub fn encode_block_status(
    out: &mut Vec<u8>,
    cookie: u64,
    context: u32,
    extents: &[StatusExtent],
    done: bool,
) {
    const MOST: usize = (MAX_CONTROL_PAYLOAD as usize - 4) / 8;
    let extents = &extents[..extents.len().min(MOST)];
    let length = 4 + 8 * extents.len() as u32;
    out.extend_from_slice(&ChunkHeader { kind: ChunkKind::BlockStatus, done, cookie, length }.encode());
    out.extend_from_slice(&context.to_be_bytes());
    for extent in extents {
        out.extend_from_slice(&extent.length.to_be_bytes());
        out.extend_from_slice(&extent.flags.to_be_bytes());
    }
}

#[cfg(test)]
mod tests;
