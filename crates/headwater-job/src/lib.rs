//! Jobs: long work on a disk's graph while guests use it.
//!
//! - [`state`]: the states of a job and what is legal in each.
//! - [`window`]: how much is kept in flight.

pub mod state;
pub mod window;
