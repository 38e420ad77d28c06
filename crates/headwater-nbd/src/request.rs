//! Requests: 28 bytes, followed by the data of a write.

use crate::error::{ErrorCode, ProtocolError};
use crate::flags::{CommandFlags, TransmissionFlags};
use crate::wire::{self, Reader};

/// What a request wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// `NBD_CMD_READ`.
    Read,
    /// `NBD_CMD_WRITE`; its data follow the request.
    Write,
    /// `NBD_CMD_DISC`: the client goes; there is no reply.
    Disconnect,
    /// `NBD_CMD_FLUSH`: all writes that were answered become durable.
    Flush,
    /// `NBD_CMD_TRIM`.
    Trim,
    /// `NBD_CMD_CACHE`: prefetch.
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`.
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`; only with structured replies and a negotiated context.
    BlockStatus,
    /// A command that this crate does not know; it has no payload and is answered with an error.
    Other(u16),
}

impl Command {
    /// The command of a request's type field.
    pub fn from_wire(code: u16) -> Self {
        match code {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Other(other),
        }
    }

    /// The type field for the wire.
    pub fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Other(other) => other,
        }
    }
}

/// One request, as sent. Decoding checks its magic only; [`Request::check`] is the server's judgement of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is wanted.
    pub command: Command,
    /// How.
    pub flags: CommandFlags,
    /// The client's name for the request; the reply carries it. Must be unique among the requests in flight.
    pub cookie: u64,
    /// First byte on the export; zero for flush and disconnect.
    pub offset: u64,
    /// Length in bytes; zero for flush and disconnect.
    pub length: u32,
}

impl Request {
    /// Length of an encoded request, without the data of a write.
    pub const LEN: usize = 28;

    /// A request without flags.
    pub fn new(command: Command, cookie: u64, offset: u64, length: u32) -> Self {
        Self { command, flags: CommandFlags::NONE, cookie, offset, length }
    }

    /// The polite end of a connection. The server finishes what is in flight and closes; it does not reply.
    pub fn disconnect() -> Self {
        Self::new(Command::Disconnect, 0, 0, 0)
    }

    /// The same request with `flags`.
    #[must_use]
    pub fn with_flags(self, flags: CommandFlags) -> Self {
        Self { flags, ..self }
    }

    /// The bytes for the wire; the data of a write follow them.
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&wire::REQUEST.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.bits().to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_wire().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// The request at the front of `input`; `None` when there are fewer than [`Request::LEN`] bytes.
    ///
    /// # Errors
    /// [`ProtocolError::BadMagic`]: the client has lost step and must be cut off.
    pub fn decode(input: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let mut reader = Reader::new(input);
        let Some(magic) = reader.u32() else { return Ok(None) };
        if magic != wire::REQUEST {
            return Err(ProtocolError::BadMagic {
                what: "a request",
                found: magic.into(),
                expected: wire::REQUEST.into(),
            });
        }
        let fields = (reader.u16(), reader.u16(), reader.u64(), reader.u64(), reader.u32());
        let (Some(flags), Some(command), Some(cookie), Some(offset), Some(length)) = fields else {
            return Ok(None);
        };
        let (flags, command) = (CommandFlags::from_bits(flags), Command::from_wire(command));
        Ok(Some(Self { command, flags, cookie, offset, length }))
    }

    /// How many bytes of data follow the request on the wire, whether it is valid or not.
    pub fn payload_len(&self) -> u32 {
        match self.command {
            Command::Write => self.length,
            _ => 0,
        }
    }

    /// First byte after the request's range; `None` when it does not fit in 64 bits.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.length.into())
    }
}

/// What a server promised one client, against which [`Request::check`] holds each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Size of the export in bytes.
    pub size: u64,
    /// The flags that were announced.
    pub flags: TransmissionFlags,
    /// Smallest length and alignment of a request, in bytes; a power of two.
    pub minimum_block: u32,
    /// Longest payload of a read or a write, in bytes.
    pub maximum_payload: u32,
    /// Whether structured replies were negotiated.
    pub structured: bool,
    /// Whether at least one meta context was negotiated.
    pub contexts: bool,
}

impl Request {
    /// Whether the request may be carried out.
    ///
    /// # Errors
    /// The code to answer with, as the protocol document assigns them: `Invalid` for unknown commands and flags,
    /// commands that were not offered, misaligned or over-long requests, and reads, trims and status requests beyond
    /// the end; `NoSpace` for writes beyond the end; `Permission` for changes to a read-only export; `Overflow` for a
    /// "don't fragment" read that is too long.
    pub fn check(&self, terms: &Terms) -> Result<(), ErrorCode> {
        use TransmissionFlags as Offer;
        let (own_flags, offered) = match self.command {
            Command::Read => (CommandFlags::DF, Offer::NONE),
            Command::Write => (CommandFlags::NONE, Offer::NONE),
            Command::Disconnect => return Ok(()),
            Command::Flush => (CommandFlags::NONE, Offer::SEND_FLUSH),
            Command::Trim => (CommandFlags::NONE, Offer::SEND_TRIM),
            Command::Cache => (CommandFlags::NONE, Offer::SEND_CACHE),
            Command::WriteZeroes => {
                (CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO, Offer::SEND_WRITE_ZEROES)
            }
            Command::BlockStatus => (CommandFlags::REQ_ONE, Offer::NONE),
            Command::Other(_) => return Err(ErrorCode::Invalid),
        };
        let changes = matches!(self.command, Command::Write | Command::WriteZeroes | Command::Trim);
        // Read-only exports don't offer trim or write-zeroes; the answer is still "permission", not "invalid".
        if changes && terms.flags.contains(Offer::READ_ONLY) {
            return Err(ErrorCode::Permission);
        }
        let mut allowed = own_flags;
        if terms.flags.contains(Offer::SEND_FUA) {
            allowed |= CommandFlags::FUA;
        }
        if !terms.flags.contains(Offer::SEND_DF) {
            allowed = allowed.without(CommandFlags::DF);
        }
        if !terms.flags.contains(Offer::SEND_FAST_ZERO) {
            allowed = allowed.without(CommandFlags::FAST_ZERO);
        }
        if !terms.flags.contains(offered) || !self.flags.without(allowed).is_empty() {
            return Err(ErrorCode::Invalid);
        }
        if self.command == Command::Flush {
            // Offset and length are reserved here and ignored, as other servers do.
            return Ok(());
        }
        self.check_range(terms)
    }

    fn check_range(&self, terms: &Terms) -> Result<(), ErrorCode> {
        let beyond_end = match self.command {
            Command::Write | Command::WriteZeroes => ErrorCode::NoSpace,
            _ => ErrorCode::Invalid,
        };
        if self.end().is_none_or(|end| end > terms.size) {
            return Err(beyond_end);
        }
        let mask = u64::from(terms.minimum_block).saturating_sub(1);
        if (self.offset | u64::from(self.length)) & mask != 0 {
            return Err(ErrorCode::Invalid);
        }
        match self.command {
            Command::Read if self.length > terms.maximum_payload => {
                let whole = self.flags.contains(CommandFlags::DF);
                Err(if whole { ErrorCode::Overflow } else { ErrorCode::Invalid })
            }
            Command::Write if self.length > terms.maximum_payload => Err(ErrorCode::Invalid),
            Command::BlockStatus if self.length == 0 || !terms.structured || !terms.contexts => {
                Err(ErrorCode::Invalid)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
