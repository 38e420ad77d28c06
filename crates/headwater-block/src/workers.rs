//! Where work is done that needs the processor for so long that a disk's thread shouldn't do it.
//!
//! A layer hands over what it wants done and waits for the result as it waits for I/O. It is told where when it is opened, because
//! nothing here may start a thread: in the simulator, and where nobody waits, the work is done on the spot ([`ON_THE_SPOT`]).

use crate::error::Result;
use crate::node::LocalFuture;
use std::fmt::Debug;
use std::future::ready;

/// What is to be done; it gives bytes.
pub type Work = Box<dyn FnOnce() -> Vec<u8> + Send>;

/// Those who do it.
pub trait Workers: Debug {
    /// Has `work` done, and gives what it gave. May be dropped: the work may then be done for nothing.
    ///
    /// # Errors
    /// If there is nobody to do it.
    fn run(&self, work: Work) -> LocalFuture<'static, Result<Vec<u8>>>;
}

/// Nobody else: the thread does it itself.
#[derive(Debug)]
struct OnTheSpot;

/// Work is done where it is asked for.
pub static ON_THE_SPOT: &(dyn Workers + Sync) = &OnTheSpot;

impl Workers for OnTheSpot {
    fn run(&self, work: Work) -> LocalFuture<'static, Result<Vec<u8>>> {
        Box::pin(ready(Ok(work())))
    }
}
