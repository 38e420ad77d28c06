//! Option haggling: everything before the first request.
//!
//! Both sides are state machines that consume themselves: [`ClientHandshake::step`], [`TlsHandshake::step`],
//! [`ListHandshake::step`] and [`ServerHandshake::step`] take what was received, append what is to be sent, and return a [`Step`].
//!
//! ```
//! use headwater_nbd::{ClientAsk, ClientHandshake, ServerOffer, Step};
//! use std::io::{Error, Read, Write};
//!
//! fn negotiate(socket: &mut (impl Read + Write), ask: ClientAsk) -> Result<ServerOffer, Error> {
//!     let mut handshake = ClientHandshake::new(ask);
//!     let (mut input, mut output) = (Vec::new(), Vec::new());
//!     loop {
//!         match handshake.step(&input, &mut output).map_err(Error::other)? {
//!             Step::Done { outcome, consumed } => {
//!                 // After the last option the server waits for requests.
//!                 assert_eq!(input.len(), consumed);
//!                 return Ok(outcome);
//!             }
//!             Step::Next { state, consumed } => {
//!                 input.drain(..consumed);
//!                 socket.write_all(&output)?;
//!                 output.clear();
//!                 handshake = state;
//!             }
//!             Step::More { state, needed } => {
//!                 let known = input.len();
//!                 input.resize(needed, 0);
//!                 if socket.read_exact(&mut input[known..]).is_err() {
//!                     return Err(Error::other(state.closed()));
//!                 }
//!                 handshake = state;
//!             }
//!         }
//!     }
//! }
//! ```

mod client;
mod list;
mod server;
mod start_tls;

pub use client::{ClientAsk, ClientHandshake, ServerOffer};
pub use list::{ListHandshake, ListedExport};
pub use server::{ClientChoice, ExportInfo, ServerHandshake, ServerOutcome, ServerRules};
pub use start_tls::TlsHandshake;

use std::fmt;

use crate::error::{OptionRefusal, ProtocolError, printable};
use crate::wire::{self, Reader};

/// Longest name of an export or context, and longest text, that the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;

/// Longest data of an option or of its reply that is buffered, in bytes. The longest legitimate ones hold a name
/// and some context names.
pub const MAX_OPTION: u32 = 64 << 10;

/// The context that tells holes and zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// The context that tells how deep in a backing chain data lie.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// Bits of the greeting and of the client's answer.
const FIXED_NEWSTYLE: u32 = 1;
const NO_ZEROES: u32 = 2;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;

const INFO_EXPORT: u16 = 0;
const INFO_NAME: u16 = 1;
const INFO_DESCRIPTION: u16 = 2;
const INFO_BLOCK_SIZE: u16 = 3;

/// Length of the greeting.
const GREETING_LEN: usize = 18;
/// Length of an option without its data.
const OPTION_LEN: usize = 16;
/// Length of a reply to an option without its data.
const OPTION_REPLY_LEN: usize = 20;
/// Zeroes after the answer to `EXPORT_NAME`, unless both sides agreed to leave them out.
const EXPORT_NAME_PADDING: usize = 124;

/// What one call of a handshake's `step` led to.
#[derive(Debug)]
pub enum Step<State, Outcome> {
    /// Nothing was consumed: call again with at least `needed` bytes of input in all. `needed` never reaches beyond
    /// the message that is being received, so a caller that reads just so much never takes bytes of the next phase.
    More {
        /// The unchanged state.
        state: State,
        /// Total length of input to wait for.
        needed: usize,
    },
    /// A message was taken: drop `consumed` bytes from the input, send the output, call again with the rest.
    Next {
        /// The state after it.
        state: State,
        /// How much input was used.
        consumed: usize,
    },
    /// Negotiation is over: drop `consumed` bytes from the input and send the output.
    Done {
        /// What was agreed.
        outcome: Outcome,
        /// How much input was used.
        consumed: usize,
    },
}

/// An option's number (`NBD_OPT_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OptionCode {
    /// Choose an export and end negotiation, without a way to report errors.
    ExportName,
    /// End the connection.
    Abort,
    /// List exports.
    List,
    /// Start TLS.
    StartTls,
    /// Ask about an export.
    Info,
    /// Choose an export and end negotiation.
    Go,
    /// Use structured replies.
    StructuredReply,
    /// List contexts of block status.
    ListMetaContext,
    /// Choose contexts of block status.
    SetMetaContext,
    /// Use extended headers.
    ExtendedHeaders,
    /// An option that this crate does not know.
    Other(u32),
}

impl OptionCode {
    fn from_wire(code: u32) -> Self {
        match code {
            1 => Self::ExportName,
            2 => Self::Abort,
            3 => Self::List,
            5 => Self::StartTls,
            6 => Self::Info,
            7 => Self::Go,
            8 => Self::StructuredReply,
            9 => Self::ListMetaContext,
            10 => Self::SetMetaContext,
            11 => Self::ExtendedHeaders,
            other => Self::Other(other),
        }
    }

    fn to_wire(self) -> u32 {
        match self {
            Self::ExportName => 1,
            Self::Abort => 2,
            Self::List => 3,
            Self::StartTls => 5,
            Self::Info => 6,
            Self::Go => 7,
            Self::StructuredReply => 8,
            Self::ListMetaContext => 9,
            Self::SetMetaContext => 10,
            Self::ExtendedHeaders => 11,
            Self::Other(other) => other,
        }
    }
}

impl fmt::Display for OptionCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ExportName => "NBD_OPT_EXPORT_NAME",
            Self::Abort => "NBD_OPT_ABORT",
            Self::List => "NBD_OPT_LIST",
            Self::StartTls => "NBD_OPT_STARTTLS",
            Self::Info => "NBD_OPT_INFO",
            Self::Go => "NBD_OPT_GO",
            Self::StructuredReply => "NBD_OPT_STRUCTURED_REPLY",
            Self::ListMetaContext => "NBD_OPT_LIST_META_CONTEXT",
            Self::SetMetaContext => "NBD_OPT_SET_META_CONTEXT",
            Self::ExtendedHeaders => "NBD_OPT_EXTENDED_HEADERS",
            Self::Other(code) => return write!(f, "number {code}"),
        })
    }
}

/// Limits on requests, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths must be multiples of this power of two.
    pub minimum: u32,
    /// Requests that are multiples of this power of two are fast.
    pub preferred: u32,
    /// Longest payload of a read or a write. `u32::MAX` means no limit of its own.
    pub maximum: u32,
}

impl BlockSizes {
    /// What to assume of a server that does not tell: any alignment, and the 32 MiB that the protocol document asks every server to take.
    pub const UNKNOWN: Self = Self { minimum: 1, preferred: 4096, maximum: 32 << 20 };

    /// Whether the sizes obey the protocol: powers of two where demanded, in order.
    pub fn is_valid(&self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 64 << 10
            && self.preferred.is_power_of_two()
            && self.preferred >= 512.max(self.minimum)
            && (self.maximum == u32::MAX
                || self.maximum >= self.preferred && self.maximum.is_multiple_of(self.minimum))
    }
}

/// A context that both sides agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContext {
    /// What block status chunks call it.
    pub id: u32,
    /// Its name, such as [`BASE_ALLOCATION`].
    pub name: String,
}

/// Appends `NBD_OPT_ABORT`: the polite way for a client to leave before negotiation ends. The server's answer need not be awaited.
pub fn encode_abort(out: &mut Vec<u8>) {
    encode_option(out, OptionCode::Abort, &[]);
}

fn encode_option(out: &mut Vec<u8>, option: OptionCode, data: &[u8]) {
    out.extend_from_slice(&wire::IHAVEOPT.to_be_bytes());
    out.extend_from_slice(&option.to_wire().to_be_bytes());
    // Data are names from our own side, each checked against MAX_STRING.
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// What a server says first.
struct Greeting {
    fixed: bool,
    no_zeroes: bool,
}

impl Greeting {
    /// `None` when there are too few bytes.
    fn decode(input: &[u8]) -> Result<Option<Self>, ProtocolError> {
        let mut reader = Reader::new(input);
        let Some(first) = reader.u64() else { return Ok(None) };
        if first != wire::NBDMAGIC {
            return Err(ProtocolError::NotNbd { found: first });
        }
        let Some(second) = reader.u64() else { return Ok(None) };
        match second {
            wire::IHAVEOPT => {}
            wire::OLDSTYLE => return Err(ProtocolError::OldStyle),
            found => {
                let (what, expected) = ("the second half of the greeting", wire::IHAVEOPT);
                return Err(ProtocolError::BadMagic { what, found, expected });
            }
        }
        let Some(flags) = reader.u16().map(u32::from) else { return Ok(None) };
        Ok(Some(Self { fixed: flags & FIXED_NEWSTYLE != 0, no_zeroes: flags & NO_ZEROES != 0 }))
    }

    /// The client's answer: the same flags.
    fn answer(&self, out: &mut Vec<u8>) {
        let fixed = if self.fixed { FIXED_NEWSTYLE } else { 0 };
        let no_zeroes = if self.no_zeroes { NO_ZEROES } else { 0 };
        out.extend_from_slice(&(fixed | no_zeroes).to_be_bytes());
    }
}

/// One reply to an option.
enum OptionReply<'a> {
    /// So many bytes are needed.
    Incomplete(usize),
    /// A positive reply.
    Reply { kind: u32, data: &'a [u8], consumed: usize },
    /// A refusal, with the server's words.
    Refused { refusal: OptionRefusal, message: String, consumed: usize },
}

impl<'a> OptionReply<'a> {
    /// The reply at the front of `input`, which must answer `option`.
    fn decode(input: &'a [u8], option: OptionCode) -> Result<Self, ProtocolError> {
        const WHAT: &str = "the reply to an option";
        let mut reader = Reader::new(input);
        let Some(magic) = reader.u64() else { return Ok(Self::Incomplete(OPTION_REPLY_LEN)) };
        if magic != wire::OPTION_REPLY {
            return Err(ProtocolError::BadMagic { what: WHAT, found: magic, expected: wire::OPTION_REPLY });
        }
        let (Some(echo), Some(kind), Some(length)) = (reader.u32(), reader.u32(), reader.u32()) else {
            return Ok(Self::Incomplete(OPTION_REPLY_LEN));
        };
        if echo != option.to_wire() {
            let why = format!("it answers {}, expected {option}", OptionCode::from_wire(echo));
            return Err(ProtocolError::malformed(WHAT, why));
        }
        if length > MAX_OPTION {
            let (length, limit) = (length.into(), MAX_OPTION.into());
            return Err(ProtocolError::TooLong { what: WHAT, length, limit });
        }
        let consumed = OPTION_REPLY_LEN + length as usize;
        let Some(data) = reader.bytes(length as usize) else { return Ok(Self::Incomplete(consumed)) };
        Ok(match OptionRefusal::from_wire(kind) {
            Some(refusal) => Self::Refused { refusal, message: printable(data), consumed },
            None => Self::Reply { kind, data, consumed },
        })
    }
}

fn unexpected(option: OptionCode, kind: u32) -> ProtocolError {
    ProtocolError::malformed("the reply to an option", format!("type {kind} does not belong to {option}"))
}

#[cfg(test)]
mod tests;
