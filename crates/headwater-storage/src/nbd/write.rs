//! Changes of an export.
//!
//! Changes are not made again when the connection is lost: the caller learns of it. Worse, what the server acknowledged on that connection
//! may be gone with a server that crashed, so that a later flush on a new connection would promise what nobody can. Such a flush fails, and
//! so do all after it. All this unless the user wants changes repeated: then the server is taken to keep what it acknowledged.

use super::connection::{Answer, Connection, Reply};
use super::{Attempts, NbdNode, misplaced, settle};
use futures_util::future::join_all;
use headwater_block::{Buffer, Error, ErrorKind, Result, WriteFlags, ZeroFlags, recall};
use headwater_nbd::{Command, CommandFlags, TransmissionFlags};
use std::cell::Cell;
use tokio::sync::oneshot;

/// The longest range that is zeroed or trimmed with one request, in bytes. Some servers do it in one go, and answer nothing else meanwhile.
const LONGEST_RANGE: u64 = 1 << 30;

/// The longest run of zeroes that is sent as data, in bytes.
const ZEROES: u64 = 1 << 20;

/// What a flush has to account for.
#[derive(Default)]
pub(super) struct Durability {
    /// How many changes were acknowledged.
    changes: Cell<u64>,
    /// How many connections had been lost when the first change that isn't flushed was sent.
    unflushed: Cell<Option<u64>>,
    /// Some of those that aren't flushed can't be recalled. The others are a job's, which flushes them itself if it ends well, and are no use otherwise.
    missed: Cell<bool>,
    /// Changes were lost, or may have been.
    lost: Cell<bool>,
}

impl NbdNode {
    pub(super) async fn write_parts(&self, offset: u64, data: Buffer, flags: WriteFlags) -> Result<()> {
        let len = data.len() as u64;
        self.check_change("write", offset, len)?;
        let _mark = self.statuses.change(offset..offset + len);
        let most = self.pool.max_data() as usize;
        let fua = flags.fua && self.offers(TransmissionFlags::SEND_FUA);
        let wire = if fua { CommandFlags::FUA } else { CommandFlags::NONE };
        let parts = (0..data.len()).step_by(most).map(|at| {
            let part = data.slice(at..data.len().min(at + most));
            let (offset, len) = (offset + at as u64, part.len() as u64);
            self.change("write", offset, len, fua, move |connection| {
                connection.write(offset, part.clone(), wire)
            })
        });
        // All of them, even if one fails: none may be in flight when the caller goes on.
        join_all(parts).await.into_iter().collect::<Result<()>>()?;
        if flags.fua && !fua { self.make_durable().await } else { Ok(()) }
    }

    pub(super) async fn zero_parts(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        self.check_change("write zeroes", offset, len)?;
        let offered = self.offers(TransmissionFlags::SEND_WRITE_ZEROES);
        if flags.fast_only && !(offered && self.offers(TransmissionFlags::SEND_FAST_ZERO)) {
            let message = format!("{}: the server cannot say whether zeroes are fast", self.name);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if !offered {
            return self.zeroes_as_data(offset, len, flags.fua).await;
        }
        let _mark = self.statuses.change(offset..offset + len);
        let fua = flags.fua && self.offers(TransmissionFlags::SEND_FUA);
        let mut wire = if fua { CommandFlags::FUA } else { CommandFlags::NONE };
        if !flags.unmap {
            wire |= CommandFlags::NO_HOLE;
        }
        if flags.fast_only {
            wire |= CommandFlags::FAST_ZERO;
        }
        self.ranges("write zeroes", Command::WriteZeroes, wire, offset, len).await?;
        if flags.fua && !fua { self.make_durable().await } else { Ok(()) }
    }

    async fn zeroes_as_data(&self, offset: u64, len: u64, fua: bool) -> Result<()> {
        let most = ZEROES.min(self.pool.max_data().into());
        let zeroes = Buffer::zeroed(most.min(len) as usize);
        let mut at = 0;
        while at < len {
            let part = zeroes.slice(0..most.min(len - at) as usize);
            let next = at + part.len() as u64;
            self.write_parts(offset + at, part, WriteFlags::default()).await?;
            at = next;
        }
        if fua { self.make_durable().await } else { Ok(()) }
    }

    pub(super) async fn trim_parts(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        if !self.offers(TransmissionFlags::SEND_TRIM) {
            return Ok(());
        }
        // Only whole blocks within the export can be given back.
        let minimum = self.minimum();
        let end = offset.saturating_add(len).min(self.size);
        let end = end - end % minimum;
        let start = offset.checked_next_multiple_of(minimum).unwrap_or(end);
        if start >= end {
            return Ok(());
        }
        let _mark = self.statuses.change(start..end);
        self.ranges("trim", Command::Trim, CommandFlags::NONE, start, end - start).await
    }

    pub(super) async fn make_durable(&self) -> Result<()> {
        let durability = &self.durability;
        if durability.lost.get() {
            return Err(self.changes_lost());
        }
        let Some(losses) = durability.unflushed.get() else { return Ok(()) };
        if !durability.missed.get() && !recall::is_recallable() {
            return Ok(());
        }
        if !self.offers(TransmissionFlags::SEND_FLUSH) {
            let message = format!(
                "{}: the server offers no flush, so nobody knows when data are durable; use another server",
                self.name
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let covered = durability.changes.get();
        let what = format_args!("flush of {}", self.name);
        let mut attempts = Attempts::new(self.retry);
        loop {
            let connection = recall::wait(self.pool.acquire()).await??;
            let all_there = || self.repeat_changes || self.pool.losses() == losses;
            let reply = if all_there() {
                Some(settle(connection.plain(Command::Flush, CommandFlags::NONE, 0, 0)).await)
            } else {
                None
            };
            if !all_there() {
                durability.lost.set(true);
                return Err(self.changes_lost());
            }
            match reply {
                Some(Ok(Answer::Done)) => break,
                Some(Err(failure)) if self.repeat_changes && self.again(&mut attempts, &failure).await? => {}
                Some(Err(failure)) => return Err(failure.error.context(what)),
                _ => return Err(misplaced().context(what)),
            }
        }
        if durability.changes.get() == covered {
            durability.unflushed.set(None);
            durability.missed.set(false);
        }
        Ok(())
    }

    fn changes_lost(&self) -> Error {
        let message = format!(
            "flush of {}: a connection was lost after writes that had not been flushed; they may be lost: write them again",
            self.name
        );
        Error::new(ErrorKind::Io, message)
    }

    fn check_writable(&self) -> Result<()> {
        if self.pool.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, format!("{} is open for reading only", self.name)));
        }
        Ok(())
    }

    fn check_change(&self, what: &str, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            let size = self.size;
            let message = format!(
                "{what} of {len} bytes at {offset} of {}: the export ends at {size} and cannot grow",
                self.name
            );
            return Err(Error::new(ErrorKind::NoSpace, message));
        }
        let minimum = self.minimum();
        if !offset.is_multiple_of(minimum) || !len.is_multiple_of(minimum) {
            let message = format!(
                "{what} of {len} bytes at {offset} of {}: the server takes multiples of {minimum} bytes",
                self.name
            );
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        Ok(())
    }

    /// Sends a command without data for a range, in as many requests as it takes.
    async fn ranges(
        &self,
        what: &str,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let durable = flags.contains(CommandFlags::FUA);
        let mut at = offset;
        while at < offset + len {
            // At most `LONGEST_RANGE`, a multiple of every block size.
            let part = (offset + len - at).min(LONGEST_RANGE);
            let send = |connection: &Connection| connection.plain(command, flags, at, part);
            self.change(what, at, part, durable, send).await?;
            at += part;
        }
        Ok(())
    }

    async fn change(
        &self,
        what: &str,
        offset: u64,
        len: u64,
        durable: bool,
        send: impl Fn(&Connection) -> oneshot::Receiver<Reply>,
    ) -> Result<()> {
        let mut attempts = Attempts::new(self.retry);
        loop {
            let connection = recall::wait(self.pool.acquire()).await??;
            let losses = self.pool.losses();
            match settle(send(&connection)).await {
                Ok(Answer::Done) => {
                    if !durable {
                        let durability = &self.durability;
                        durability.changes.set(durability.changes.get() + 1);
                        durability.unflushed.set(Some(durability.unflushed.get().unwrap_or(losses)));
                        durability.missed.set(durability.missed.get() || !recall::is_recallable());
                    }
                    return Ok(());
                }
                Ok(_) => return Err(self.refused(misplaced(), what, offset, len)),
                Err(failure) if self.repeat_changes && self.again(&mut attempts, &failure).await? => {}
                Err(failure) => return Err(self.refused(failure.error, what, offset, len)),
            }
        }
    }
}
