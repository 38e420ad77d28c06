//! The simulator: tests only. A disk with its jobs and its storage runs here on one thread, in virtual time, from one seed.
//!
//! - [`Sim`] is the executor: at every step a seeded choice among the tasks that can go on, so that over many seeds everything
//!   interleaves at every await. [`SimClock`] is its clock: time passes when nothing else can happen.
//! - [`SimFile`] is storage with latency, bandwidth, faults and a stall switch; [`SimOverlay`] is a small image format with a backing
//!   on top of it, which checks the contract that [`headwater_block::Node`] makes with its caller; [`SimFilter`] adds nothing.
//! - [`Recorder`] keeps what several files go through, in one order; [`Cuts`] says what a power cut at any of its moments may leave.
//! - [`Model`] says which bytes a guest may see.
//! - [`for_seeds`] runs a test for many seeds; a failing one is printed and replays with `HEADWATER_SEED`.
//!
//! # Fault model
//! What the simulated storage may do, and so what the code above it must survive:
//! - An operation takes any time. It takes effect piece by piece (512 bytes at a time, in any order) somewhere between its start
//!   and its end; concurrent operations on the same bytes see any mixture of old and new pieces.
//! - Operations complete in any order. Look-ups of tables may wait as well.
//! - An operation may fail, once, for a while or for ever ([`Fault`]). A failed write may have changed any of the pieces that it covers; a
//!   failed read gives nothing.
//! - Storage may stall: nothing completes until it is released. A source that stalls may stall for ever.
//! - A discard frees any of the pieces that it covers, or none; freed bytes read as zeroes.
//! - A read future may be dropped at any await. A future that changes something is polled to its end, unless the power fails.
//! - The power may fail at any moment, for all files at once. Of what was written since the last completed flush any sectors of 512 bytes may
//!   have reached the disk, in any order: [`power_cut`] has the rules, and puts the files together as a cut may leave them.
//!
//! What it never does: bytes don't change by themselves, a write never changes bytes outside its range, a source doesn't change
//! while it is read, and what a completed flush (or a write with FUA) covers isn't lost.

mod contract;
mod device;
mod executor;
mod faults;
mod file;
mod filter;
mod model;
mod overlay;
mod pages;
pub mod power_cut;
mod recorder;
mod rng;
mod seeds;

pub use device::{Device, Pace};
pub use executor::{Sim, SimClock, Task};
pub use faults::{Fault, Faults, Op};
pub use file::SimFile;
pub use filter::SimFilter;
pub use model::{Fill, Model, Mutation, Reading};
pub use overlay::{Defect, SimOverlay};
pub use pages::Pages;
pub use power_cut::Cuts;
pub use recorder::{Event, History, Recorder};
pub use rng::Rng;
pub use seeds::for_seeds;
