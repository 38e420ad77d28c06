//! The NBD protocol as a codec: bytes in, bytes out.
//!
//! Nothing here reads a socket, a clock or a file, and nothing depends on the rest of the workspace. A caller owns the
//! connection, hands over what it received and sends what it is given. The protocol is the one of the NBD project's
//! `doc/proto.md`, with fixed newstyle negotiation only.
//!
//! | module        | what it holds                                                                            |
//! |---------------|------------------------------------------------------------------------------------------|
//! | [`negotiate`] | option haggling, client ([`ClientHandshake`], [`TlsHandshake`], [`ListHandshake`]) and server ([`ServerHandshake`]) |
//! | [`headers`]   | how long the headers are that two peers agreed on                                        |
//! | [`request`]   | requests and the rules about their flags and bounds                                      |
//! | [`reply`]     | simple replies and structured chunks; [`ReadCoverage`] checks that a read was answered whole |
//! | [`uri`]       | `nbd://host:port/export` and `nbd+unix:///export?socket=path`                            |
//! | [`address`]   | which addresses of a host name count                                                     |
//! | [`flags`]     | transmission and command flags                                                           |
//! | [`error`]     | the error codes of the wire, and what can be wrong with a peer                           |
//!
//! Invariants: bytes from the peer never panic, and never make this crate allocate more than the limits named in
//! [`negotiate`] and [`reply`]. All lengths are in bytes.
//!
//! # A client, in order
//! 1. Parse an [`NbdUri`], connect.
//! 2. Drive a [`ClientHandshake`] with [`Step`]s until it is done; keep the [`ServerOffer`].
//! 3. Send [`Request::encode`] (followed by the payload of a write), as many as wanted at a time.
//! 4. Read replies: [`ReplyHeader::decode`], then for a chunk its payload by [`ChunkHeader::kind`].
//! 5. Send [`Request::disconnect`] and close.

#![forbid(unsafe_code)]

pub mod address;
pub mod error;
pub mod flags;
pub mod headers;
pub mod negotiate;
pub mod reply;
pub mod request;
pub mod uri;
mod wire;

pub use address::IpFamily;
pub use error::{ErrorCode, ProtocolError};
pub use flags::{CommandFlags, TransmissionFlags};
pub use headers::{Encoded, Headers};
pub use negotiate::{
    BlockSizes, ClientAsk, ClientChoice, ClientHandshake, ExportInfo, ListHandshake, ListedExport,
    MetaContext, ServerHandshake, ServerOffer, ServerOutcome, ServerRules, Step, TlsHandshake,
};
pub use reply::{ChunkHeader, ChunkKind, ReadCoverage, ReplyHeader, ReplyTo};
pub use request::{Command, Request, StatusFilter, Terms};
pub use uri::{NbdAddress, NbdUri, UriError, UriTls};
