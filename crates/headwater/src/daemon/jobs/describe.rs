//! What is told of a job.

use super::Job;
use crate::daemon::failure::{brief, errno_text};
use headwater_job::{IoStatus, Outcome, Progress, Status};
use serde_json::{Value, json};

impl Job {
    /// What it works on, in bytes: of a disk that changes, what was found to copy so far.
    pub(super) fn seen_len(&self) -> u64 {
        if self.follows { self.handle.progress().total } else { self.len }
    }

    /// How far it is, in bytes of the disk: what need not be copied counts as done.
    pub(super) fn seen_offset(&self) -> u64 {
        let progress = self.handle.progress();
        if self.follows {
            return progress.done.min(progress.total);
        }
        let done = match (self.handle.status(), self.handle.outcome()) {
            (_, Some(Outcome::Completed)) | (Status::Waiting | Status::Pending, _) => self.len,
            (Status::Created, _) => 0,
            _ if progress.total_is_exact => {
                self.len.saturating_sub(progress.total.saturating_sub(progress.done))
            }
            _ => progress.done,
        };
        self.offset.set(self.offset.get().max(done.min(self.len)));
        self.offset.get()
    }

    /// What events tell of it.
    pub(super) fn numbers(&self) -> Value {
        json!({
            "device": self.id,
            "len": self.seen_len(),
            "offset": self.seen_offset(),
            "speed": self.handle.speed(),
            "type": self.kind,
        })
    }

    pub(super) fn describe(&self) -> Value {
        let block_job = self.is_block_job();
        let (current, total) = if block_job {
            (self.seen_offset(), self.seen_len())
        } else {
            (u64::from(self.handle.status().is_over()), 1)
        };
        let mut told = json!({
            "id": self.id,
            "type": self.kind,
            "status": self.handle.status().to_string(),
            "current-progress": current,
            "total-progress": total,
        });
        if let (Value::Object(told), Some(wait)) = (&mut told, self.handle.waits_for()) {
            told.insert("x-waiting-for".into(), wait.what.to_string().into());
        }
        if let (Value::Object(told), Some(error)) = (&mut told, self.error()) {
            told.insert("error".into(), error.into());
        }
        told
    }

    pub(super) fn error(&self) -> Option<String> {
        match self.handle.outcome()? {
            Outcome::Failed(err) if self.is_block_job() => Some(brief(&err)),
            Outcome::Failed(err) => Some(err.to_string()),
            Outcome::Cancelled => Some(errno_text(libc::ECANCELED)),
            Outcome::Completed => None,
        }
    }

    pub(super) fn describe_block_job(&self) -> Value {
        let status = self.handle.status();
        let io_status = match self.handle.io_status() {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        };
        let mut told = json!({
            "device": self.id,
            "type": self.kind,
            "status": status.to_string(),
            "len": self.seen_len(),
            "offset": self.seen_offset(),
            "speed": self.handle.speed(),
            "busy": self.handle.is_busy(),
            "paused": self.handle.is_paused(),
            "ready": self.handle.is_ready(),
            "io-status": io_status,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        });
        let Value::Object(fields) = &mut told else { return told };
        if let Some(error) = self.error() {
            fields.insert("error".into(), error.into());
        }
        if let Some(through) = &self.write_through {
            let Progress { total, done, .. } = self.handle.progress();
            let synced = through.get() && self.handle.is_ready() && total == done;
            fields.insert("actively-synced".into(), synced.into());
        }
        told
    }
}
