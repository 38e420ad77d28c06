//! The NBD server.
//!
//! A connection's way through the modules:
//!
//! - `server` accepts at its address, starts a session per connection and ends them in order.
//! - `exports` holds what is served, which may change at any time.
//! - `handshake` drives the negotiation of `headwater-nbd` over the `socket`, which starts TLS where the server has credentials.
//! - `session` owns the connection afterwards. It alone reads, starts requests, collects their replies and writes, so that
//!   no state is shared and batches form by themselves: what `receive` decodes from one `recv` starts together, and the
//!   replies that are ready together leave `replies` with one `writev`.
//! - `handler` carries one request out on the disk of the moment.
//!
//! # Rules
//! - A request that was started is driven to its end, whatever the client does: a change that is dropped half-way would
//!   poison the disk.
//! - A client holds at most `session::MAX_BYTES_IN_FLIGHT` of memory for requests and replies, and as many requests as
//!   `session::MAX_REQUESTS`; while it has them, nothing is read from it.
//! - What a client sends can end its own connection, nothing else.

mod exports;
mod handler;
mod handshake;
mod receive;
mod replies;
mod server;
mod session;
mod socket;
mod stats;

pub use exports::Export;
pub use server::{NbdServer, ServerOptions};
pub use stats::ServerStats;
