//! Replies: simple ones, and the chunks of structured ones.
//!
//! A simple reply is 16 bytes, followed by the data if it answers a read without error. A structured reply is one or
//! more chunks of 20 bytes and a payload; the last has the DONE flag. Which of the two a reply is, its magic tells; a
//! server that negotiated structured replies may still send simple ones for commands other than reads.
//!
//! With extended headers all replies are chunks, of 32 bytes and a payload. They tell the offset of the request, too, and block status has
//! lengths of 64 bits.

mod coverage;

pub use coverage::ReadCoverage;

use crate::error::{ErrorCode, ProtocolError, printable};
use crate::headers::{Encoded, Headers};
use crate::wire::{self, Reader};

/// Longest payload of an error chunk that is taken, and of a block status chunk that is sent, in bytes. The latter then has
/// at most 131,071 extents.
pub const MAX_CONTROL_PAYLOAD: u32 = 1 << 20;

/// Longest payload of a block status chunk that is taken from a server, in bytes: 1,048,576 extents, the most that nbdkit sends.
pub const MAX_STATUS_PAYLOAD: u32 = (8 << 20) + 4;

/// The same with extended headers.
pub const MAX_EXTENDED_STATUS_PAYLOAD: u32 = (16 << 20) + 8;

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
    /// The same with an extended header.
    pub const EXTENDED_LEN: usize = 32;

    /// The header at the front of `input` and how many bytes it takes; `None` when `input` is too short for it.
    ///
    /// `headers` are those that were negotiated, `max_data` says how long a data chunk may be (the longest read that the caller sends).
    ///
    /// # Errors
    /// [`ProtocolError`] if this is no reply, or a chunk that breaks the protocol: the connection is lost.
    pub fn decode(
        input: &[u8],
        headers: Headers,
        max_data: u32,
    ) -> Result<Option<(Self, usize)>, ProtocolError> {
        let mut reader = Reader::new(input);
        let Some(magic) = reader.u32() else { return Ok(None) };
        match magic {
            wire::SIMPLE_REPLY if !headers.are_extended() => {
                let (Some(error), Some(cookie)) = (reader.u32(), reader.u64()) else { return Ok(None) };
                Ok(Some((Self::Simple { cookie, error: ErrorCode::from_wire(error) }, Self::SIMPLE_LEN)))
            }
            wire::CHUNK if headers == Headers::Structured => {
                let fields = (reader.u16(), reader.u16(), reader.u64(), reader.u32());
                let (Some(flags), Some(kind), Some(cookie), Some(length)) = fields else { return Ok(None) };
                let to = ReplyTo { headers, cookie, offset: 0 };
                let chunk = ChunkHeader::from_wire(to, flags, kind, length.into(), max_data)?;
                Ok(Some((Self::Chunk(chunk), Self::CHUNK_LEN)))
            }
            wire::EXTENDED_CHUNK if headers.are_extended() => {
                let fields = (reader.u16(), reader.u16(), reader.u64(), reader.u64(), reader.u64());
                let (Some(flags), Some(kind), Some(cookie), Some(offset), Some(length)) = fields else {
                    return Ok(None);
                };
                let to = ReplyTo { headers, cookie, offset };
                let chunk = ChunkHeader::from_wire(to, flags, kind, length, max_data)?;
                Ok(Some((Self::Chunk(chunk), Self::EXTENDED_LEN)))
            }
            found => Err(ProtocolError::BadMagic {
                what: "a reply",
                found: found.into(),
                expected: match headers {
                    Headers::Simple => wire::SIMPLE_REPLY,
                    Headers::Structured => wire::CHUNK,
                    Headers::Extended => wire::EXTENDED_CHUNK,
                }
                .into(),
            }),
        }
    }

    /// Which request this belongs to.
    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } => *cookie,
            Self::Chunk(chunk) => chunk.to.cookie,
        }
    }
}

/// Which request a reply is for, and in which form. A cookie alone stands for a compact header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// What was negotiated.
    pub headers: Headers,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset, which extended headers tell; otherwise 0 where a reply is decoded.
    pub offset: u64,
}

impl From<u64> for ReplyTo {
    fn from(cookie: u64) -> Self {
        Self { headers: Headers::Structured, cookie, offset: 0 }
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
    /// Extents of one context ([`decode_block_status`]); of the form that goes with the headers.
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
const TYPE_BLOCK_STATUS_EXT: u16 = 6;
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
    pub to: ReplyTo,
    /// Length of the payload. Already checked: within the limits, and possible for `kind`.
    pub length: u32,
}

impl ChunkHeader {
    fn from_wire(
        to: ReplyTo,
        flags: u16,
        code: u16,
        length: u64,
        max_data: u32,
    ) -> Result<Self, ProtocolError> {
        let extended = to.headers.are_extended();
        const WHAT: &str = "a reply chunk";
        let kind = match code {
            TYPE_NONE => ChunkKind::None,
            TYPE_OFFSET_DATA => ChunkKind::OffsetData,
            TYPE_OFFSET_HOLE => ChunkKind::OffsetHole,
            TYPE_BLOCK_STATUS if !extended => ChunkKind::BlockStatus,
            TYPE_BLOCK_STATUS_EXT if extended => ChunkKind::BlockStatus,
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
            ChunkKind::BlockStatus if extended => (24, MAX_EXTENDED_STATUS_PAYLOAD),
            ChunkKind::BlockStatus => (12, MAX_STATUS_PAYLOAD),
            ChunkKind::Error => (6, MAX_CONTROL_PAYLOAD),
            ChunkKind::ErrorOffset => (14, MAX_CONTROL_PAYLOAD),
        };
        let length = match u32::try_from(length) {
            Ok(length) if length <= longest => length,
            _ => return Err(ProtocolError::TooLong { what: WHAT, length, limit: longest.into() }),
        };
        if length < shortest {
            let why = format!("{kind:?} with {length} bytes, expected at least {shortest}");
            return Err(ProtocolError::malformed(WHAT, why));
        }
        Ok(Self { kind, done: flags & DONE != 0, to, length })
    }

    /// How many bytes of data a data chunk carries after its offset; zero for other chunks.
    pub fn data_len(&self) -> u32 {
        match self.kind {
            ChunkKind::OffsetData => self.length.saturating_sub(8),
            _ => 0,
        }
    }

    /// The bytes for the wire; the payload follows them.
    pub fn encode(&self) -> Encoded {
        let extended = self.to.headers.are_extended();
        let code = match self.kind {
            ChunkKind::None => TYPE_NONE,
            ChunkKind::OffsetData => TYPE_OFFSET_DATA,
            ChunkKind::OffsetHole => TYPE_OFFSET_HOLE,
            ChunkKind::BlockStatus if extended => TYPE_BLOCK_STATUS_EXT,
            ChunkKind::BlockStatus => TYPE_BLOCK_STATUS,
            ChunkKind::Error => TYPE_ERROR,
            ChunkKind::ErrorOffset => TYPE_ERROR_OFFSET,
        };
        let encoded = Encoded::new()
            .with(if extended { wire::EXTENDED_CHUNK } else { wire::CHUNK }.to_be_bytes())
            .with(if self.done { DONE } else { 0 }.to_be_bytes())
            .with(code.to_be_bytes())
            .with(self.to.cookie.to_be_bytes());
        if extended {
            encoded.with(self.to.offset.to_be_bytes()).with(u64::from(self.length).to_be_bytes())
        } else {
            encoded.with(self.length.to_be_bytes())
        }
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
    /// Length in bytes, not zero. Compact headers have 32 bits for it.
    pub length: u64,
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
/// [`ProtocolError::Malformed`] if the payload is no whole number of extents, as many as it says, or one of them is empty, or has flags
/// beyond 32 bits, which no context has that is known here.
pub fn decode_block_status(
    payload: &[u8],
    headers: Headers,
) -> Result<(u32, Vec<StatusExtent>), ProtocolError> {
    const WHAT: &str = "a block status chunk";
    let mut reader = Reader::new(payload);
    let context = reader.u32().ok_or_else(|| ProtocolError::malformed(WHAT, "no context"))?;
    let extended = headers.are_extended();
    let count = if extended { reader.u32().map(|count| count as usize) } else { None };
    let mut extents = Vec::with_capacity(payload.len() / if extended { 16 } else { 8 });
    while !reader.is_empty() {
        let (length, flags) = if extended {
            (reader.u64(), reader.u64())
        } else {
            (reader.u32().map(u64::from), reader.u32().map(u64::from))
        };
        let (Some(length), Some(flags)) = (length, flags) else {
            return Err(ProtocolError::malformed(WHAT, "half an extent at its end"));
        };
        if length == 0 {
            return Err(ProtocolError::malformed(WHAT, "an extent without length"));
        }
        let flags = u32::try_from(flags)
            .map_err(|_| ProtocolError::malformed(WHAT, format!("unknown flags {flags:#x}")))?;
        extents.push(StatusExtent { length, flags });
    }
    if extents.is_empty() {
        return Err(ProtocolError::malformed(WHAT, "no extent"));
    }
    if extended && count != Some(extents.len()) {
        let why = format!("{} extents, and it says {}", extents.len(), count.unwrap_or(0));
        return Err(ProtocolError::malformed(WHAT, why));
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
pub fn encode_simple(cookie: u64, error: Option<ErrorCode>) -> Encoded {
    Encoded::new()
        .with(wire::SIMPLE_REPLY.to_be_bytes())
        .with(error.map_or(0, ErrorCode::to_wire).to_be_bytes())
        .with(cookie.to_be_bytes())
}

/// Chunk header and offset of a data chunk; `length` bytes of data (not zero, at most `u32::MAX - 8`) follow it.
pub fn encode_data_prefix(to: impl Into<ReplyTo>, offset: u64, length: u32, done: bool) -> Encoded {
    let length = length.saturating_add(8);
    let header = ChunkHeader { kind: ChunkKind::OffsetData, done, to: to.into(), length };
    header.encode().with(offset.to_be_bytes())
}

/// A whole hole chunk: `length` bytes (not zero) at `offset` read as zeroes.
pub fn encode_hole(to: impl Into<ReplyTo>, offset: u64, length: u32, done: bool) -> Encoded {
    let header = ChunkHeader { kind: ChunkKind::OffsetHole, done, to: to.into(), length: 12 };
    header.encode().with(offset.to_be_bytes()).with(length.to_be_bytes())
}

/// A whole chunk without payload that ends a successful answer.
pub fn encode_done(to: impl Into<ReplyTo>) -> Encoded {
    ChunkHeader { kind: ChunkKind::None, done: true, to: to.into(), length: 0 }.encode()
}

/// Appends a whole error chunk to `out`, the last of its answer. Of `message` at most 4096 bytes are sent.
pub fn encode_error(out: &mut Vec<u8>, to: impl Into<ReplyTo>, code: ErrorCode, message: &str) {
    let mut end = message.len().min(4096);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    // `end` is at most 4096, so neither cast loses anything.
    let length = 6 + end as u32;
    let header = ChunkHeader { kind: ChunkKind::Error, done: true, to: to.into(), length };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&code.to_wire().to_be_bytes());
    out.extend_from_slice(&(end as u16).to_be_bytes());
    out.extend_from_slice(&message.as_bytes()[..end]);
}

/// Appends a whole block status chunk to `out`. `extents` must not be empty, and with compact headers none is longer than 32 bits say;
/// those that would take the payload over [`MAX_CONTROL_PAYLOAD`] are left out, which the protocol allows (the client asks again).
pub fn encode_block_status(
    out: &mut Vec<u8>,
    to: impl Into<ReplyTo>,
    context: u32,
    extents: &[StatusExtent],
    done: bool,
) {
    let to = to.into();
    let extended = to.headers.are_extended();
    let (fixed, each) = if extended { (8, 16) } else { (4, 8) };
    let extents = &extents[..extents.len().min((MAX_CONTROL_PAYLOAD as usize - fixed) / each)];
    let length = (fixed + each * extents.len()) as u32;
    out.extend_from_slice(&ChunkHeader { kind: ChunkKind::BlockStatus, done, to, length }.encode());
    out.extend_from_slice(&context.to_be_bytes());
    if extended {
        out.extend_from_slice(&(extents.len() as u32).to_be_bytes());
    }
    for extent in extents {
        if extended {
            out.extend_from_slice(&extent.length.to_be_bytes());
            out.extend_from_slice(&u64::from(extent.flags).to_be_bytes());
        } else {
            let length = u32::try_from(extent.length).unwrap_or(u32::MAX);
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&extent.flags.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
