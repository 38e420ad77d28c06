//! Carries one request out on the disk and makes its reply.

use std::rc::Rc;

use headwater_block::{Buffer, Client, Error, ErrorKind, Extent, ExtentKind, WriteFlags, ZeroFlags};
use headwater_nbd::negotiate::BASE_ALLOCATION;
use headwater_nbd::reply::{STATE_HOLE, STATE_ZERO, StatusExtent, encode_block_status};
use headwater_nbd::{Command, CommandFlags, ErrorCode, MetaContext, Request};

use super::receive::Incoming;
use super::replies::Reply;
use super::stats::ServerStats;

/// Most extents of one context in one reply. The client asks again from where they end; a bound keeps one request from
/// occupying the thread for long.
const MAX_EXTENTS: usize = 1024;

/// How many bytes a `CACHE` request fetches at once.
const CACHE_STEP: u64 = 1 << 20;

/// What a session's requests are carried out on.
pub(crate) struct Handler {
    /// Leads to the disk.
    pub(crate) client: Client,
    /// Whether every change is durable before it is answered.
    pub(crate) writethrough: bool,
    /// Whether replies are structured.
    pub(crate) structured: bool,
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
        };
        result.unwrap_or_else(|(code, words)| {
            self.stats.count_failure();
            tracing::debug!(command = ?request.command, offset = request.offset, length = request.length, "{words}");
            Reply::failure(request.cookie, self.structured, code, &words)
        })
    }

    async fn carry_out(&self, request: &Request, data: Option<Buffer>) -> Result<Reply, Error> {
        let Request { command, flags, cookie, offset, length } = *request;
        let fua = self.writethrough || flags.contains(CommandFlags::FUA);
        let client = &self.client;
        match command {
            Command::Read => {
                let data = if self.structured {
                    client.read_unless_zero(offset, length.into()).await?
                } else {
                    Some(client.read(offset, length.into()).await?)
                };
                self.stats.count_read(length);
                return Ok(match data {
                    Some(data) => Reply::data(cookie, self.structured, offset, data),
                    None => Reply::hole(cookie, offset, length),
                });
            }
            Command::Write => {
                let data = data.unwrap_or_else(|| Buffer::zeroed(0));
                client.write(offset, data, WriteFlags { fua, ..WriteFlags::default() }).await?;
                if !fua {
                    client.settle(offset..offset + u64::from(length)).await?;
                }
                self.stats.count_write(length);
            }
            Command::WriteZeroes => {
                let unmap = !flags.contains(CommandFlags::NO_HOLE);
                let fast_only = flags.contains(CommandFlags::FAST_ZERO);
                client.write_zeroes(offset, length.into(), ZeroFlags { fua, unmap, fast_only }).await?;
                if !fua {
                    client.settle(offset..offset + u64::from(length)).await?;
                }
                self.stats.count_other();
            }
            Command::Trim => {
                let disk = client.enter().await;
                disk.discard(offset, length.into()).await?;
                if fua {
                    disk.flush().await?;
                }
                self.stats.count_other();
            }
            Command::Flush => {
                client.enter().await.flush().await?;
                self.stats.count_other();
            }
            Command::Cache => {
                cache(client, offset, length.into()).await?;
                self.stats.count_other();
            }
            Command::BlockStatus => {
                let one = flags.contains(CommandFlags::REQ_ONE);
                let reply = self.block_status(request, one).await?;
                self.stats.count_other();
                return Ok(reply);
            }
            // Neither reaches this place: one ends the session, the other is refused by `Request::check`.
            Command::Disconnect | Command::Other(_) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("{command:?} is no request for a disk"),
                ));
            }
        }
        Ok(Reply::success(cookie))
    }

    async fn block_status(&self, request: &Request, one: bool) -> Result<Reply, Error> {
        let range = request.offset..request.offset + u64::from(request.length);
        let extents = self.client.block_status(range, MAX_EXTENTS).await?;
        let mut bytes = Vec::new();
        for (index, context) in self.contexts.iter().enumerate() {
            let state = match context.name.as_str() {
                BASE_ALLOCATION => allocation,
                _ => depth,
            };
            let mut merged = merge(&extents, state);
            if one {
                merged.truncate(1);
            }
            let done = index + 1 == self.contexts.len();
            encode_block_status(&mut bytes, request.cookie, context.id, &merged, done);
        }
        Ok(Reply::chunks(bytes))
    }
}

/// Prefetches where there is a place that keeps what was fetched; elsewhere it would only cost I/O.
async fn cache(client: &Client, offset: u64, length: u64) -> Result<(), Error> {
    if !client.disk().keeps_what_is_read() {
        return Ok(());
    }
    let end = offset + length;
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

/// Extents for the wire: neighbours of one state become one. All come from one request, whose length has 32 bits.
fn merge(extents: &[Extent], state: fn(&Extent) -> u32) -> Vec<StatusExtent> {
    let mut merged: Vec<StatusExtent> = Vec::new();
    for extent in extents {
        let flags = state(extent);
        let length = u32::try_from(extent.len).unwrap_or(u32::MAX);
        match merged.last_mut() {
            Some(last) if last.flags == flags => last.length = last.length.saturating_add(length),
            _ => merged.push(StatusExtent { length, flags }),
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
