//! The record of one job on disk, from the job's start to its end.
//!
//! What is asked of a job while it works is written before it is answered. Writing waits for the disk, so it is done by another thread while requests go on;
//! one write at a time, so that the last wish is the one that stays.

use super::record::Record;
use super::state_dir::StateDir;
use headwater_block::range_lock::{Mode, RangeLock, Token};
use headwater_block::{Error, ErrorKind, Result};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

/// See the module. Belongs to the thread of the job.
pub struct Kept {
    dir: Arc<StateDir>,
    /// The file's name in there.
    name: String,
    record: RefCell<Record>,
    writing: Rc<RangeLock>,
    /// The file is gone, and stays so.
    forgotten: Cell<bool>,
}

impl Kept {
    /// Writes the record of a job that is to be, durably; there must be none of that name.
    ///
    /// # Errors
    /// `AlreadyExists`, and what the system says.
    pub async fn create(dir: &Arc<StateDir>, name: String, record: Record) -> Result<Rc<Self>> {
        let kept = Self::found(dir, name, record);
        let bytes = kept.record.borrow().encode();
        kept.on_disk(move |dir, name| dir.create(name, &bytes)).await?;
        Ok(kept)
    }

    /// As [`Kept::create`], in the place of what may be there.
    ///
    /// # Errors
    /// What the system says.
    pub async fn replace(dir: &Arc<StateDir>, name: String, record: Record) -> Result<Rc<Self>> {
        let kept = Self::found(dir, name, record);
        kept.update(|_| {}).await?;
        Ok(kept)
    }

    /// A record that was found on disk.
    pub fn found(dir: &Arc<StateDir>, name: String, record: Record) -> Rc<Self> {
        Rc::new(Self {
            dir: dir.clone(),
            name,
            record: RefCell::new(record),
            writing: RangeLock::new(),
            forgotten: Cell::new(false),
        })
    }

    /// What is recorded.
    pub fn record(&self) -> Record {
        self.record.borrow().clone()
    }

    /// How people call the file.
    pub fn shown(&self) -> String {
        self.dir.shown(&self.name)
    }

    /// Changes the record; it is durable when this returns.
    ///
    /// # Errors
    /// What the system says. The file is then as it was.
    pub async fn update(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let _turn = self.writing.acquire(Token::for_request(), 0..1, Mode::Exclusive).await;
        if self.forgotten.get() {
            return Ok(());
        }
        let bytes = {
            let mut record = self.record.borrow_mut();
            change(&mut record);
            record.encode()
        };
        self.on_disk(move |dir, name| dir.replace(name, &bytes)).await
    }

    /// Removes the record, durably: the job has ended, or is not to go on.
    ///
    /// # Errors
    /// What the system says.
    pub async fn forget(&self) -> Result<()> {
        let _turn = self.writing.acquire(Token::for_request(), 0..1, Mode::Exclusive).await;
        if self.forgotten.replace(true) {
            return Ok(());
        }
        self.on_disk(|dir, name| dir.remove(name)).await
    }

    /// Works on the file on a thread that may wait.
    async fn on_disk(&self, work: impl FnOnce(&StateDir, &str) -> Result<()> + Send + 'static) -> Result<()> {
        let (dir, name) = (self.dir.clone(), self.name.clone());
        match tokio::task::spawn_blocking(move || work(&dir, &name)).await {
            Ok(done) => done,
            Err(_) => {
                let message = format!("{}: the thread that wrote it is gone", self.shown());
                Err(Error::new(ErrorKind::Io, message))
            }
        }
    }
}
