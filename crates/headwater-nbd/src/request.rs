//! Requests: 28 bytes, or 32 with extended headers, followed by the data of a write.

use crate::error::{ErrorCode, ProtocolError};
use crate::flags::{CommandFlags, TransmissionFlags};
use crate::headers::{Encoded, Headers};
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
    /// Length in bytes; zero for flush and disconnect. With [`CommandFlags::PAYLOAD_LEN`] that of the payload.
    pub length: u64,
}

impl Request {
    /// Length of an encoded request with a compact header, without the data of a write.
    pub const LEN: usize = 28;
    /// The same with an extended header.
    pub const EXTENDED_LEN: usize = 32;

    /// Length of a request with these headers, without the data of a write.
    pub fn len_of(headers: Headers) -> usize {
        if headers.are_extended() { Self::EXTENDED_LEN } else { Self::LEN }
    }

    /// A request without flags.
    pub fn new(command: Command, cookie: u64, offset: u64, length: u64) -> Self {
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

    /// The bytes for the wire; the data of a write follow them. A compact header has 32 bits for the length: who makes requests knows
    /// the headers, and asks for no more.
    pub fn encode(&self, headers: Headers) -> Encoded {
        let (magic, flags) = match self.command {
            _ if !headers.are_extended() => (wire::REQUEST, self.flags),
            Command::Write => (wire::EXTENDED_REQUEST, self.flags | CommandFlags::PAYLOAD_LEN),
            _ => (wire::EXTENDED_REQUEST, self.flags),
        };
        let encoded = Encoded::new()
            .with(magic.to_be_bytes())
            .with(flags.bits().to_be_bytes())
            .with(self.command.to_wire().to_be_bytes())
            .with(self.cookie.to_be_bytes())
            .with(self.offset.to_be_bytes());
        if headers.are_extended() {
            return encoded.with(self.length.to_be_bytes());
        }
        // Part of a range must never be taken for all of it.
        let length = u32::try_from(self.length).expect("a compact request is for less than 4 GiB");
        encoded.with(length.to_be_bytes())
    }

    /// The request at the front of `input`; `None` when there are fewer than [`Request::len_of`] bytes.
    ///
    /// # Errors
    /// [`ProtocolError::BadMagic`]: the client has lost step and must be cut off.
    pub fn decode(input: &[u8], headers: Headers) -> Result<Option<Self>, ProtocolError> {
        let expected = if headers.are_extended() { wire::EXTENDED_REQUEST } else { wire::REQUEST };
        let mut reader = Reader::new(input);
        let Some(magic) = reader.u32() else { return Ok(None) };
        if magic != expected {
            return Err(ProtocolError::BadMagic {
                what: "a request",
                found: magic.into(),
                expected: expected.into(),
            });
        }
        let fields = (reader.u16(), reader.u16(), reader.u64(), reader.u64());
        let length = if headers.are_extended() { reader.u64() } else { reader.u32().map(u64::from) };
        let ((Some(flags), Some(command), Some(cookie), Some(offset)), Some(length)) = (fields, length)
        else {
            return Ok(None);
        };
        let (flags, command) = (CommandFlags::from_bits(flags), Command::from_wire(command));
        Ok(Some(Self { command, flags, cookie, offset, length }))
    }

    /// How many bytes of data follow the request on the wire, whether it is valid or not.
    ///
    /// # Errors
    /// [`ProtocolError::TooLong`]: with an extended header a client may say any length. One beyond what it was told is not waited for.
    pub fn payload_len(&self, terms: &Terms) -> Result<u32, ProtocolError> {
        // QEMU's client leaves the flag out of its writes, and sends the data.
        let says_so = terms.headers.are_extended() && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        if self.command != Command::Write && !says_so {
            return Ok(0);
        }
        // A compact header can't say more than 32 bits, and what it says is skipped.
        let limit = if terms.headers.are_extended() { terms.maximum_payload } else { u32::MAX };
        match u32::try_from(self.length) {
            Ok(length) if length <= limit => Ok(length),
            _ => {
                let (what, length, limit) = ("the payload of a request", self.length, limit.into());
                Err(ProtocolError::TooLong { what, length, limit })
            }
        }
    }

    /// First byte after the request's range; `None` when it does not fit in 64 bits.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(self.length)
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
    /// Which headers were negotiated.
    pub headers: Headers,
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
        let extended = terms.headers.are_extended();
        match self.command {
            Command::Write if extended => allowed |= CommandFlags::PAYLOAD_LEN,
            Command::BlockStatus if extended && terms.flags.contains(Offer::BLOCK_STATUS_PAYLOAD) => {
                allowed |= CommandFlags::PAYLOAD_LEN;
            }
            _ => {}
        }
        if !terms.flags.contains(offered) || !self.flags.without(allowed).is_empty() {
            return Err(ErrorCode::Invalid);
        }
        if self.command == Command::BlockStatus && self.flags.contains(CommandFlags::PAYLOAD_LEN) {
            // The payload tells the range: see `StatusFilter`.
            return Ok(());
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
        if (self.offset | self.length) & mask != 0 {
            return Err(ErrorCode::Invalid);
        }
        match self.command {
            Command::Read if self.length > terms.maximum_payload.into() => {
                let whole = self.flags.contains(CommandFlags::DF);
                Err(if whole { ErrorCode::Overflow } else { ErrorCode::Invalid })
            }
            Command::Write if self.length > terms.maximum_payload.into() => Err(ErrorCode::Invalid),
            Command::BlockStatus
                if self.length == 0 || !terms.headers.are_structured() || !terms.contexts =>
            {
                Err(ErrorCode::Invalid)
            }
            _ => Ok(()),
        }
    }
}

/// What a `BLOCK_STATUS` with a payload asks: a range, and some of the contexts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusFilter {
    /// The request with the length that it is for, and no payload.
    pub request: Request,
    /// The ids of the contexts that are wanted; not empty, each once.
    pub contexts: Vec<u32>,
}

impl StatusFilter {
    /// The longest payload that can be right, in bytes, if a client chose `contexts` of them.
    pub fn longest_payload(contexts: usize) -> usize {
        8 + 4 * contexts
    }

    /// Reads the payload of a request that [`Request::check`] let pass. `chosen` are the ids that were negotiated.
    ///
    /// # Errors
    /// `Invalid` for a payload of another form, and for contexts that were not negotiated or stand there twice; else those of
    /// [`Request::check`].
    pub fn decode(
        request: &Request,
        payload: &[u8],
        chosen: impl Fn(u32) -> bool,
        terms: &Terms,
    ) -> Result<Self, ErrorCode> {
        let mut reader = Reader::new(payload);
        let length = reader.u64().ok_or(ErrorCode::Invalid)?;
        let mut contexts = Vec::new();
        while !reader.is_empty() {
            let id = reader.u32().ok_or(ErrorCode::Invalid)?;
            if contexts.contains(&id) || !chosen(id) {
                return Err(ErrorCode::Invalid);
            }
            contexts.push(id);
        }
        if contexts.is_empty() {
            return Err(ErrorCode::Invalid);
        }
        let flags = request.flags.without(CommandFlags::PAYLOAD_LEN);
        let request = Request { length, flags, ..*request };
        request.check(terms)?;
        Ok(Self { request, contexts })
    }
}

#[cfg(test)]
mod tests;
