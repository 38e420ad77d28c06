//! Tests only: a vhost-user front end and a guest's driver in one, made by hand: they can do everything right, and everything wrong.
//!
//! - [`protocol`]: what messages and descriptors are made of, for whoever sends them.
//! - [`Guest`] is the guest's memory, [`Client`] a connection to a back end, [`Ring`] a virtqueue as the guest's driver has it.
//!
//! Whatever doesn't go as it must panics, but what is said to be told otherwise. `examples/load` puts a back end under load.

mod client;
mod guest;
pub mod protocol;
mod ring;

pub use client::{Client, Reply};
pub use guest::{Guest, REGION, USER};
pub use ring::{DATA, HEADER, Piece, QUEUE, ROOM, Ring, STATUS, request_pieces, rings};

use std::time::Duration;

/// How long anything may take.
pub const LIMIT: Duration = Duration::from_secs(20);
