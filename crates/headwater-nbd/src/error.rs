//! The error codes of the wire, and what can be wrong with a peer.

use std::fmt;

use crate::negotiate::OptionCode;

/// The error of one request, as sent in a simple reply or an error chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    /// `NBD_EPERM`: a write to a read-only export.
    Permission,
    /// `NBD_EIO`: the storage failed.
    Io,
    /// `NBD_ENOMEM`: the server is out of memory.
    NoMemory,
    /// `NBD_EINVAL`: the request is malformed, or reads, trims or asks beyond the end.
    Invalid,
    /// `NBD_ENOSPC`: a write beyond the end, or storage that is full.
    NoSpace,
    /// `NBD_EOVERFLOW`: the answer does not fit, as with a "don't fragment" read that is too long.
    Overflow,
    /// `NBD_ENOTSUP`: a fast zero that would not be fast.
    NotSupported,
    /// `NBD_ESHUTDOWN`: the server is going down.
    Shutdown,
    /// A code that the protocol does not define; to be treated like [`ErrorCode::Invalid`].
    Other(u32),
}

impl ErrorCode {
    /// The code from the wire; `None` for zero, which means success.
    pub fn from_wire(code: u32) -> Option<Self> {
        Some(match code {
            0 => return None,
            1 => Self::Permission,
            5 => Self::Io,
            12 => Self::NoMemory,
            22 => Self::Invalid,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSupported,
            108 => Self::Shutdown,
            other => Self::Other(other),
        })
    }

    /// The code for the wire, never zero.
    pub fn to_wire(self) -> u32 {
        match self {
            Self::Permission => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
            Self::Invalid | Self::Other(0) => 22,
            Self::Other(other) => other,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Permission => f.write_str("operation not permitted (NBD_EPERM)"),
            Self::Io => f.write_str("input/output error (NBD_EIO)"),
            Self::NoMemory => f.write_str("out of memory (NBD_ENOMEM)"),
            Self::Invalid => f.write_str("invalid argument (NBD_EINVAL)"),
            Self::NoSpace => f.write_str("no space left (NBD_ENOSPC)"),
            Self::Overflow => f.write_str("answer too large (NBD_EOVERFLOW)"),
            Self::NotSupported => f.write_str("not supported (NBD_ENOTSUP)"),
            Self::Shutdown => f.write_str("the server is shutting down (NBD_ESHUTDOWN)"),
            Self::Other(code) => write!(f, "unknown NBD error {code}"),
        }
    }
}

impl std::error::Error for ErrorCode {}

/// Why a server refused an option, from the reply's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionRefusal {
    /// `NBD_REP_ERR_UNSUP`: the server does not know the option.
    Unsupported,
    /// `NBD_REP_ERR_POLICY`: the server's configuration forbids it.
    Policy,
    /// `NBD_REP_ERR_INVALID`: the option was malformed or came at the wrong time.
    Invalid,
    /// `NBD_REP_ERR_PLATFORM`: the server was built without it.
    Platform,
    /// `NBD_REP_ERR_TLS_REQD`: the server wants TLS first.
    TlsRequired,
    /// `NBD_REP_ERR_UNKNOWN`: there is no such export.
    UnknownExport,
    /// `NBD_REP_ERR_SHUTDOWN`: the server is going down.
    Shutdown,
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`: the export's block sizes must be asked for and honoured.
    BlockSizeRequired,
    /// `NBD_REP_ERR_TOO_BIG`: the option's data are too long.
    TooBig,
    /// `NBD_REP_ERR_EXT_HEADER_REQD`: extended headers are needed, or there already.
    ExtendedHeadersRequired,
    /// An error that this crate does not know.
    Other(u32),
}

impl OptionRefusal {
    /// The refusal that belongs to a reply type; `None` if the type is not an error.
    pub fn from_wire(reply: u32) -> Option<Self> {
        const ERROR_BIT: u32 = 1 << 31;
        (reply & ERROR_BIT != 0).then_some(match reply & !ERROR_BIT {
            1 => Self::Unsupported,
            2 => Self::Policy,
            3 => Self::Invalid,
            4 => Self::Platform,
            5 => Self::TlsRequired,
            6 => Self::UnknownExport,
            7 => Self::Shutdown,
            8 => Self::BlockSizeRequired,
            9 => Self::TooBig,
            10 => Self::ExtendedHeadersRequired,
            other => Self::Other(other),
        })
    }

    /// The reply type for the wire.
    pub fn to_wire(self) -> u32 {
        (1 << 31)
            | match self {
                Self::Unsupported => 1,
                Self::Policy => 2,
                Self::Invalid => 3,
                Self::Platform => 4,
                Self::TlsRequired => 5,
                Self::UnknownExport => 6,
                Self::Shutdown => 7,
                Self::BlockSizeRequired => 8,
                Self::TooBig => 9,
                Self::ExtendedHeadersRequired => 10,
                Self::Other(other) => other,
            }
    }
}

impl fmt::Display for OptionRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unsupported => "the server does not support it",
            Self::Policy => "the server's configuration forbids it",
            Self::Invalid => "the server calls it invalid",
            Self::Platform => "the server was built without it",
            Self::TlsRequired => "the server requires TLS, and this connection has none",
            Self::UnknownExport => "the server has no such export",
            Self::Shutdown => "the server is shutting down",
            Self::BlockSizeRequired => "the server requires its block sizes to be honoured",
            Self::TooBig => "the server calls it too long",
            Self::ExtendedHeadersRequired => {
                "the server wants extended headers for it, or has agreed on them"
            }
            Self::Other(code) => return write!(f, "the server answered with unknown error {code}"),
        })
    }
}

/// A peer that cannot be talked to any further: the connection is to be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The first bytes are not those of an NBD server.
    #[error(
        "the server does not speak NBD: its first bytes are {found:#018x}, expected {:#018x}",
        crate::wire::NBDMAGIC
    )]
    NotNbd {
        /// The first eight bytes.
        found: u64,
    },
    /// The server speaks only the oldstyle negotiation, which was removed from the protocol.
    #[error("the server speaks only oldstyle NBD; use a server with newstyle negotiation")]
    OldStyle,
    /// A magic number is wrong: the peers have lost step, or the peer does not speak NBD.
    #[error("{what} begins with {found:#x}, expected {expected:#x}")]
    BadMagic {
        /// The message that should have begun here.
        what: &'static str,
        /// What was received.
        found: u64,
        /// What the protocol demands.
        expected: u64,
    },
    /// A message is longer than this crate is willing to take.
    #[error("{what} has {length} bytes, more than the limit of {limit}")]
    TooLong {
        /// The message.
        what: &'static str,
        /// Its length, or count.
        length: u64,
        /// The limit.
        limit: u64,
    },
    /// A message's content breaks the protocol.
    #[error("{what} breaks the protocol: {why}")]
    Malformed {
        /// The message.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// The server refused an option that we cannot do without.
    #[error("option {option} for export {export:?} refused: {refusal}{}", if message.is_empty() { String::new() } else { format!(" (it says: {message})") })]
    Refused {
        /// The option.
        option: OptionCode,
        /// The export that was asked for; empty for the default export.
        export: String,
        /// The reason from the reply's type.
        refusal: OptionRefusal,
        /// The server's own words; may be empty. Control characters are replaced.
        message: String,
    },
    /// The peer closed the connection in the middle of something.
    #[error("the connection was closed {during}")]
    Closed {
        /// What was going on.
        during: String,
    },
}

impl ProtocolError {
    pub(crate) fn malformed(what: &'static str, why: impl Into<String>) -> Self {
        Self::Malformed { what, why: why.into() }
    }
}

/// Text from the peer, made safe to print: not longer than 4096 bytes, control characters and bad UTF-8 replaced.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(4096)];
    String::from_utf8_lossy(bytes)
        .chars()
        .map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}
