//! headwater's block layer: what a disk is made of, without knowing any image format or any transport.
//!
//! Read in this order to follow a guest's request downwards:
//!
//! - [`disk`]: the top of a chain of nodes. Checks bounds, aligns, locks, copies on read; what exports and jobs call.
//! - [`copy_up`]: the only way in which data moves from a backing node into the overlay.
//! - [`copy_before_write`]: what a disk held at one moment goes to another disk before it is changed.
//! - [`dirty_map`]: what has changed, for jobs that copy a disk in use.
//! - [`follow`]: copying a disk in use, behind its guests or through their changes.
//! - [`range_lock`]: the one serialisation primitive, and [`drain`], which holds all requests back.
//! - [`edge`]: how exports and filters hold a disk, such that it can be exchanged.
//! - [`hold`]: clients, whose requests wait while a source can't be reached.
//! - [`node`]: the trait that image formats and storage implement; [`extent`]: what they say about ranges; [`identity`]: how the bytes behind one are
//!   recognised later.
//! - [`buffer`]: pooled, aligned memory that requests carry. [`error`]: what every failure looks like.
//! - [`rate_limiter`] and [`clock`]: pacing, with time that a test can control; [`shared_limiter`]: one limit for several. [`backoff`]: trying again. [`mod@guest_latency`]: what guests'
//!   requests take, for those who yield to them.
//! - [`abort`]: giving up reads at once; [`recall`]: giving up changes that wait for storage.
//! - [`workers`]: where work is done that would keep the thread from its requests.
//! - [`filter`]: nodes that pass requests through and add one behaviour. [`debug_event`]: what layers tell the one that injects faults.
//! - [`share`]: one fetch for many who read the same source.
//! - [`manifest`]: what a file must hold, chunk by chunk.
//! - [`null`]: a node without storage. [`memory`]: a node that lives in memory, for tests and demonstrations.
//!
//! Everything here belongs to one thread: nodes are `Rc`, futures are not `Send`, and no state needs a mutex.

pub mod abort;
pub mod backoff;
pub mod buffer;
pub mod chain;
pub mod clock;
pub mod copy_before_write;
pub mod copy_up;
pub mod debug_event;
pub mod dirty_map;
pub mod disk;
pub mod drain;
pub mod edge;
pub mod error;
pub mod extent;
pub mod filter;
pub mod follow;
pub mod guest_latency;
pub mod hold;
pub mod identity;
pub mod manifest;
pub mod memory;
pub mod node;
pub mod null;
pub mod range_lock;
pub mod rate_limiter;
pub mod recall;
pub mod share;
pub mod shared_limiter;
pub mod workers;
pub mod write_watch;
pub mod zero;

pub use abort::Abort;
pub use backoff::{Backoff, Patience};
pub use buffer::{Buffer, BufferMut};
pub use clock::{Clock, TokioClock};
pub use copy_before_write::PointInTime;
pub use debug_event::DebugEvent;
pub use dirty_map::DirtyMap;
pub use disk::{DetectZeroes, Disk, DiskOptions};
pub use edge::Edge;
pub use error::{Error, ErrorKind, Result};
pub use extent::{Extent, ExtentKind, Resolved};
pub use follow::{Follower, Following};
pub use guest_latency::GuestLatency;
pub use hold::Client;
pub use identity::Identity;
pub use manifest::Manifest;
pub use node::{Limits, LocalFuture, Node, WriteFlags, ZeroFlags};
pub use rate_limiter::RateLimiter;
pub use shared_limiter::{Share, SharedLimiter};
pub use workers::Workers;
