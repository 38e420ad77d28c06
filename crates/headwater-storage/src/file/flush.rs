//! When a file's bytes are durable, and what a failed flush means.
//!
//! When the kernel can't write cached pages back, it tells so once per descriptor and then takes the pages for clean: a second fdatasync
//! would succeed without the data. So **the first failed flush is final**: all later ones fail, until the file is opened anew and whoever
//! uses it has found out what is there.
//!
//! For the same reason only one fdatasync runs at a time: of two at once, either might be the one that is told. Those that wait
//! meanwhile are usually all served by the next one.

use super::node::FileNode;
use super::op::Request;
use headwater_block::{Error, Result};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Which changes of a file are durable.
#[derive(Default)]
pub(super) struct Durability {
    /// How many changes ended so far.
    changes: Cell<u64>,
    /// How many of them are durable; none before the first flush, because of what another process may have left behind.
    durable: Cell<Option<u64>>,
    /// The flush that failed.
    lost: RefCell<Option<Error>>,
    running: Cell<bool>,
    waiting: RefCell<Vec<Waker>>,
}

impl Durability {
    /// A change ended.
    pub(super) fn changed(&self) {
        self.changes.set(self.changes.get() + 1);
    }

    /// Bytes may be lost because of `err`: no flush will succeed any more.
    pub(super) fn lose(&self, err: &Error) {
        self.lost.borrow_mut().get_or_insert_with(|| err.clone());
    }

    fn check(&self, name: &str) -> Result<()> {
        match &*self.lost.borrow() {
            None => Ok(()),
            Some(err) => Err(err.clone().context(format_args!(
                "{name}: what was written before an earlier failure may be lost; check the medium, then open it anew"
            ))),
        }
    }

    /// Waits for the flush that runs, and takes its place.
    async fn begin(&self) -> Turn<'_> {
        poll_fn(|cx| {
            if !self.running.get() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        self.running.set(true);
        Turn(self)
    }
}

/// The right to run fdatasync.
struct Turn<'a>(&'a Durability);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.running.set(false);
        let waiting = self.0.waiting.take();
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl FileNode {
    /// Makes all changes that have ended durable.
    pub(super) async fn flush_changes(&self) -> Result<()> {
        if self.never_flushes() {
            return Ok(());
        }
        let durability = &self.durability;
        let needed = durability.changes.get();
        let _turn = durability.begin().await;
        durability.check(&self.name)?;
        if durability.durable.get().is_some_and(|durable| durable >= needed) {
            return Ok(());
        }
        let covered = durability.changes.get();
        match self.engine.plain(&self.file, Request::Sync).await {
            Ok(_) => {
                durability.durable.set(Some(covered));
                // A durable write may have been told meanwhile what this flush should have been told.
                durability.check(&self.name)
            }
            Err(err) => {
                let err = Error::from_io(err, format_args!("flush {}", self.name));
                durability.lose(&err);
                Err(err)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_block::ErrorKind;

    #[test]
    fn a_failure_is_final_and_the_first_one_is_told() {
        let durability = Durability::default();
        assert!(durability.check("disk").is_ok());
        durability.lose(&Error::new(ErrorKind::Io, "first"));
        durability.lose(&Error::new(ErrorKind::NoSpace, "second"));
        let err = durability.check("disk").unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Io);
        assert!(err.to_string().contains("first"), "{err}");
    }
}
