//! Carries one request out on the disk and makes its reply.

use std::rc::Rc;

use headwater_block::{Buffer, Client, Error, ErrorKind, Extent, ExtentKind, WriteFlags, ZeroFlags};
use headwater_nbd::StatusFilter;
use headwater_nbd::negotiate::BASE_ALLOCATION;
use headwater_nbd::reply::{STATE_HOLE, STATE_ZERO, StatusExtent, encode_block_status};
use headwater_nbd::{Command, CommandFlags, ErrorCode, Headers, MetaContext, ReplyTo, Request};

use super::receive::Incoming;
use super::replies::Reply;
use super::stats::ServerStats;

/// Most extents of one context in one reply. The client asks again from where they end; a bound keeps one request from
/// occupying the thread for long.
const MAX_EXTENTS: usize = 1024;

/// How many bytes a `CACHE` request fetches at once, and how many at most. It is a hint, and may be for all of a disk that is far away.
const CACHE_STEP: u64 = 1 << 20;
const MOST_CACHED: u64 = 4 << 30;

/// How much of a range is zeroed or trimmed at once, in bytes. A request may be for all of a disk; it must not keep its thread for so long.
const CHANGE_STEP: u64 = 1 << 30;

/// What a session's requests are carried out on.
pub(crate) struct Handler {
    /// Leads to the disk.
    pub(crate) client: Client,
    /// Whether every change is durable before it is answered.
    pub(crate) writethrough: bool,
    /// The form of replies.
    pub(crate) headers: Headers,
    /// The contexts that each block status reply carries.
    pub(crate) contexts: Vec<MetaContext>,
    /// Where requests are counted.
    pub(crate) stats: Rc<ServerStats>,
}

impl Handler {
    /// Answers one request. The future must be driven to its end.
    pub(crate) async fn handle(self: Rc<Self>, incoming: Incoming) -> Reply {
        let (request, result) = match incoming {
            Incoming::Bad(request, code) => {
                let words = format!(
                    "{:?} of {} bytes at {}: {code}",
                    request.command, request.length, request.offset
                );
                (request, Err((code, words)))
            }
            Incoming::Request(request, data) => {
                let result = self.carry_out(&request, data).await;
                (request, result.map_err(|error| (error_code(&request, &error), error.to_string())))
            }
            Incoming::Status(StatusFilter { request, contexts }) => {
                let result = self.block_status(&request, |id| contexts.contains(&id)).await;
                (request, result.map_err(|error| (error_code(&request, &error), error.to_string())))
            }
        };
        result.unwrap_or_else(|(code, words)| {
            self.stats.count_failure();
            tracing::debug!(command = ?request.command, offset = request.offset, length = request.length, "{words}");
            Reply::failure(self.to(&request), code, &words)
        })
    }

    fn to(&self, request: &Request) -> ReplyTo {
        ReplyTo { headers: self.headers, cookie: request.cookie, offset: request.offset }
    }

    async fn carry_out(&self, request: &Request, data: Option<Buffer>) -> Result<Reply, Error> {
        let Request { command, flags, offset, length, .. } = *request;
        let to = self.to(request);
        let fua = self.writethrough || flags.contains(CommandFlags::FUA);
        let client = &self.client;
        match command {
            Command::Read => {
                let data = if self.headers.are_structured() {
                    client.read_unless_zero(offset, length).await?
                } else {
                    Some(client.read(offset, length).await?)
                };
                self.stats.count_read(length);
                return Ok(match data {
                    Some(data) => Reply::data(to, offset, data),
                    // No longer than the longest payload, which has 32 bits.
                    None => Reply::hole(to, offset, length as u32),
                });
            }
            Command::Write => {
                let data = data.unwrap_or_else(|| Buffer::zeroed(0));
                client.write(offset, data, WriteFlags { fua, ..WriteFlags::default() }).await?;
                if !fua {
                    client.settle(offset..offset + length).await?;
                }
                self.stats.count_write(length);
            }
            Command::WriteZeroes => {
                let unmap = !flags.contains(CommandFlags::NO_HOLE);
                let fast_only = flags.contains(CommandFlags::FAST_ZERO);
                for (at, step) in steps(offset, length) {
                    client.write_zeroes(at, step, ZeroFlags { fua, unmap, fast_only }).await?;
                }
                if !fua {
                    client.settle(offset..offset + length).await?;
                }
                self.stats.count_other();
            }
            Command::Trim => {
                for (at, step) in steps(offset, length) {
                    // Not across steps: whoever waits for the disk to be quiet gets a chance.
                    client.enter().await.discard(at, step).await?;
                }
                if fua {
                    client.enter().await.flush().await?;
                }
                self.stats.count_other();
            }
            Command::Flush => {
                client.enter().await.flush().await?;
                self.stats.count_other();
            }
            Command::Cache => {
                cache(client, offset, length).await?;
                self.stats.count_other();
            }
            Command::BlockStatus => {
                return self.block_status(request, |_| true).await;
            }
            // Neither reaches this place: one ends the session, the other is refused by `Request::check`.
            Command::Disconnect | Command::Other(_) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{command:?} is no request for a disk"),
                ));
            }
        }
        Ok(Reply::success(to))
    }

    async fn block_status(&self, request: &Request, wanted: impl Fn(u32) -> bool) -> Result<Reply, Error> {
        let one = request.flags.contains(CommandFlags::REQ_ONE);
        let range = request.offset..request.offset + request.length;
        let extents = self.client.block_status(range, MAX_EXTENTS).await?;
        let mut bytes = Vec::new();
        let mut contexts = self.contexts.iter().filter(|context| wanted(context.id)).peekable();
        while let Some(context) = contexts.next() {
            let state = match context.name.as_str() {
                BASE_ALLOCATION => allocation,
                _ => depth,
            };
            let mut merged = merge(&extents, state);
            if one {
                merged.truncate(1);
            }
            let done = contexts.peek().is_none();
            encode_block_status(&mut bytes, self.to(request), context.id, &merged, done);
        }
        self.stats.count_other();
        Ok(Reply::chunks(bytes))
    }
}

/// The parts of a range that are changed one after the other: offset and length.
fn steps(offset: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
    let parts = length.div_ceil(CHANGE_STEP);
    (0..parts).map(move |part| {
        let at = part * CHANGE_STEP;
        (offset + at, CHANGE_STEP.min(length - at))
    })
}

/// Prefetches where there is a place that keeps what was fetched; elsewhere it would only cost I/O.
async fn cache(client: &Client, offset: u64, length: u64) -> Result<(), Error> {
    if !client.disk().keeps_what_is_read() {
        return Ok(());
    }
    let end = offset + length.min(MOST_CACHED);
    let mut at = offset;
    while at < end {
        let step = CACHE_STEP.min(end - at);
        client.read(at, step).await?;
        at += step;
    }
    Ok(())
}

fn allocation(extent: &Extent) -> u32 {
    match extent.kind {
        ExtentKind::Data => 0,
        // Zeroes that have a place of their own on disk.
        ExtentKind::Zero if extent.host_offset.is_some() => STATE_ZERO,
        ExtentKind::Zero | ExtentKind::Unallocated => STATE_HOLE | STATE_ZERO,
    }
}

fn depth(extent: &Extent) -> u32 {
    match extent.kind {
        ExtentKind::Data | ExtentKind::Zero => extent.depth.saturating_add(1),
        ExtentKind::Unallocated => 0,
    }
}

/// Extents for the wire: neighbours of one state become one. They are within one request, and so no longer than its header can say.
fn merge(extents: &[Extent], state: fn(&Extent) -> u32) -> Vec<StatusExtent> {
    let mut merged: Vec<StatusExtent> = Vec::new();
    for extent in extents {
        let flags = state(extent);
        match merged.last_mut() {
            Some(last) if last.flags == flags => last.length += extent.len,
            _ => merged.push(StatusExtent { length: extent.len, flags }),
        }
    }
    merged
}

/// The wire's code for what went wrong.
fn error_code(request: &Request, error: &Error) -> ErrorCode {
    let writes = matches!(request.command, Command::Write | Command::WriteZeroes);
    match error.kind() {
        ErrorKind::NoSpace => ErrorCode::NoSpace,
        ErrorKind::OutOfRange if writes => ErrorCode::NoSpace,
        ErrorKind::OutOfRange | ErrorKind::InvalidInput => ErrorCode::Invalid,
        ErrorKind::ReadOnly | ErrorKind::PermissionDenied | ErrorKind::NotAllowed => ErrorCode::Permission,
        // The protocol keeps this code for zeroes that would not be fast.
        ErrorKind::Unsupported if request.flags.contains(CommandFlags::FAST_ZERO) => ErrorCode::NotSupported,
        ErrorKind::Unsupported => ErrorCode::Invalid,
        _ => ErrorCode::Io,
    }
}

#[cfg(test)]
mod tests;
