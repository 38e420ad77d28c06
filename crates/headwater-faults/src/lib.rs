//! Tests only: a proxy between a client and a server that are real, which makes the way between them as bad as a test wants it.
//!
//! - [`FaultProxy`], here: starts, is told what to do, and ends with its owner. It runs on a thread of its own, so that tests need no runtime.
//! - [`link`]: what the way does to all bytes: latency, jitter, a rate, a break after so many bytes, flipped bits.
//! - [`answers`]: what becomes of the answers of an HTTP server: status codes, headers that lie, bodies that break off, stall, trickle or rot.
//! - `http`: takes an HTTP/1.1 connection apart so far as that needs.
//!
//! # Fault model
//! Faults are those of a network and of a server's answers. What the client sends arrives as it was sent, unless the connection is lost.
//! Everything can be changed while connections are open, and counts from then on.
//!
//! ```
//! use headwater_faults::{Answer, FaultProxy, Link, Outage, Protocol, Rule};
//! use std::time::Duration;
//!
//! let server = std::net::TcpListener::bind("127.0.0.1:0")?;
//! let proxy = FaultProxy::start(server.local_addr()?, Protocol::Http)?;
//! println!("the client talks to {}", proxy.address());
//! proxy.set_link(Link { latency: Duration::from_millis(20), ..Link::default() });
//! proxy.add(Rule::new(Answer::Status { code: 503, retry_after: Some(1) }).times(3));
//! proxy.begin(Outage::Refused);
//! proxy.heal();
//! # Ok::<(), std::io::Error>(())
//! ```

pub mod answers;
mod http;
pub mod link;
mod proxy;

pub use answers::{Answer, Rule};
pub use link::Link;
pub use proxy::{FaultProxy, Outage, Protocol, Seen, Upstream};
