//! Jobs: long work on a disk's graph while guests use it. They know nodes and disks, and no image format.
//!
//! - [`stream`](mod@stream): the stream job, from its first look to the commit point. Begin here.
//! - `copy_engine`: keeps copies in flight; `scan` finds what to copy; [`window`] says how much to keep in flight.
//! - [`state`]: the states of a job and what is legal in each; `control`: what a job shares with those who command it through a
//!   [`JobHandle`]; `progress`: how far it is.
//!
//! A job is a future. It is polled on its disk's thread, to its end; nothing here spawns, sleeps or reads a clock of its own.

mod control;
mod copy_engine;
mod handle;
mod progress;
mod scan;
pub mod state;
pub mod stream;
pub mod window;

pub use control::{Action, Event, Outcome};
pub use copy_engine::OnError;
pub use handle::JobHandle;
pub use progress::Progress;
pub use state::{Illegal, Status, Verb};
pub use stream::{Base, Link, StreamOptions, stream};
