//! Jobs: long work on a disk's graph while guests use it. They know nodes and disks, and no image format.
//!
//! - [`stream`](mod@stream): the stream job, from its first look to the commit point. Begin here.
//! - [`backup`](mod@backup): to another disk, as of one moment.
//! - [`commit`](mod@commit): into a layer below, where nobody writes; [`mirror`](mod@mirror): to another disk or into a layer below, while
//!   guests write.
//! - `copy_engine`: keeps copies in flight; `scan` finds what to copy; [`window`] says how much to keep in flight. They do so for
//!   all jobs: a `copier` says what is to be copied, and copies it. `transfer` is the one of commit and mirror.
//! - [`budget`]: how much copies may have in flight beside guests; `guests_first` makes the engine keep to it.
//! - [`boot_trace`]: what guests read first. `boot_order`: a stream's first pass, in that order.
//! - [`group`]: jobs that end together.
//! - `lifecycle`: how all jobs begin and end. `on_error`: what they do about errors. `path`: what the layers on the way say about it.
//! - `foretell`: what a source that is far away is told before a job looks for its work.
//! - `waiting`: a job that pauses itself, and goes on by itself; `outage`: when the source can't be reached.
//! - `readahead`: what guests want next.
//! - [`space`]: room for what is copied.
//! - `task`: a job that is any work, done as a whole.
//! - [`state`]: the states of a job and what is legal in each; `control`: what a job shares with those who command it through a
//!   [`JobHandle`]; `progress`: how far it is.
//!
//! A job is a future. It is polled on its disk's thread, to its end; nothing here spawns, sleeps or reads a clock of its own.

pub mod backup;
mod boot_order;
pub mod boot_trace;
pub mod budget;
pub mod commit;
mod control;
mod copier;
mod copy_engine;
mod foretell;
pub mod group;
mod guests_first;
mod handle;
mod lifecycle;
pub mod mirror;
mod on_error;
mod outage;
mod path;
mod progress;
mod readahead;
mod scan;
pub mod space;
pub mod state;
pub mod stream;
mod task;
mod transfer;
mod waiting;
pub mod window;

pub use backup::{BackupOptions, backup};
pub use boot_trace::{BootRecorder, BootTrace};
pub use budget::GuestLatencyGoal;
pub use commit::{CommitOptions, commit};
pub use control::{Action, Event, IoStatus, Outcome};
pub use group::Group;
pub use handle::JobHandle;
pub use headwater_block::copy_up::Operation;
pub use lifecycle::Finish;
pub use mirror::{HoldGuests, MirrorOptions, SyncMode, commit_active, mirror};
pub use on_error::{OnError, OnErrors};
pub use progress::Progress;
pub use space::Space;
pub use state::{Illegal, Status, Verb};
pub use stream::{Base, Link, StreamOptions, stream};
pub use task::task;
pub use waiting::{Wait, Waiting};
