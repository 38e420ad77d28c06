//! The reading side of a connection: finds replies in the stream of bytes and puts data where they belong.
//!
//! Headers and small things go through a buffer of a few KiB; data go straight into the request's buffer, with one `readv` that
//! takes what follows them along. Whatever the server sends, memory stays bounded: a read's buffer exists already, everything else has a
//! limit, and what breaks the protocol ends the connection.

use super::connection::{Expect, InFlight, Shared};
use super::socket::protocol_error;
use headwater_block::{BufferMut, Error, ErrorKind, Result};
use headwater_nbd::reply::{
    ChunkHeader, ChunkKind, DATA_OFFSET_LEN, decode_block_status, decode_data_offset, decode_error,
    decode_hole,
};
use headwater_nbd::{ErrorCode, ProtocolError, ReplyHeader};
use std::cell::RefMut;
use std::convert::Infallible;
use std::io::IoSliceMut;
use std::ops::Range;
use tokio::time::Instant;

/// Size of the buffer for headers, in bytes. What of a read's data lands here is copied once more, so it is kept small; it still
/// holds three replies to 4 KiB reads.
const BUFFER: usize = 16 << 10;

/// A server may answer a read in as many chunks as it likes; one that uses more than one per this many bytes only wants to keep us busy.
const SMALLEST_CHUNK: u32 = 512;

/// Reads replies until the connection ends or the server breaks the protocol.
pub(super) async fn run(shared: &Shared) -> Result<Infallible> {
    let mut input = Input { shared, buf: vec![0; BUFFER].into(), start: 0, end: 0 };
    loop {
        // A socket that always has something to read must not starve the others.
        tokio::task::consume_budget().await;
        let header = input.header().await?;
        match header {
            ReplyHeader::Simple { cookie, error } => simple_reply(&mut input, cookie, error).await?,
            ReplyHeader::Chunk(chunk) => chunk_reply(&mut input, chunk).await?,
        }
    }
}

async fn simple_reply(input: &mut Input<'_>, cookie: u64, error: Option<ErrorCode>) -> Result<()> {
    let shared = input.shared;
    if let Some(code) = error {
        let entry = input.take(cookie)?;
        entry.finish(Err(input.refusal(code, "")));
        return Ok(());
    }
    let whole = {
        let mut entry = input.entry(cookie)?;
        match &mut entry.expect {
            Expect::Data { .. } | Expect::Extents(_) if shared.headers.are_structured() => {
                return Err(input.broken("a simple reply to a request that needs a structured one"));
            }
            Expect::Data { buf, .. } => buf.as_ref().map(|buf| 0..buf.len()),
            Expect::Extents(_) => return Err(input.broken("a simple reply to a block status request")),
            Expect::Nothing => None,
        }
    };
    if let Some(whole) = whole {
        input.data(cookie, whole).await?;
    }
    input.take(cookie)?.finish(Ok(()));
    Ok(())
}

async fn chunk_reply(input: &mut Input<'_>, chunk: ChunkHeader) -> Result<()> {
    let cookie = chunk.to.cookie;
    if chunk.to.headers.are_extended() && input.entry(cookie)?.offset != chunk.to.offset {
        return Err(input.broken("a reply to a request at another offset"));
    }
    match chunk.kind {
        // Only now: a chunk for a request that isn't there is an error even without payload.
        ChunkKind::None => drop(input.entry(cookie)?),
        ChunkKind::OffsetData => {
            let mut offset = [0; DATA_OFFSET_LEN];
            input.copy(&mut offset).await?;
            let range = input.cover(cookie, decode_data_offset(offset), chunk.data_len())?;
            input.data(cookie, range).await?;
        }
        ChunkKind::OffsetHole => {
            let payload = input.control(chunk.length).await?;
            let (offset, length) = decode_hole(&payload).map_err(|e| input.error(e))?;
            let range = input.cover(cookie, offset, length)?;
            if let Expect::Data { buf: Some(buf), .. } = &mut input.entry(cookie)?.expect {
                buf[range].fill(0);
            }
        }
        ChunkKind::BlockStatus => {
            let payload = input.control(chunk.length).await?;
            let (context, found) =
                decode_block_status(&payload, chunk.to.headers).map_err(|e| input.error(e))?;
            if Some(context) != input.shared.allocation {
                return Err(input.broken("the status of a context that was not asked for"));
            }
            match &mut input.entry(cookie)?.expect {
                Expect::Extents(extents) if extents.is_empty() => *extents = found,
                _ => return Err(input.broken("a block status chunk that does not belong to its request")),
            }
        }
        ChunkKind::Error | ChunkKind::ErrorOffset => {
            let payload = input.control(chunk.length).await?;
            let found = decode_error(chunk.kind, &payload).map_err(|e| input.error(e))?;
            let error = input.refusal(found.code, &found.message);
            input.entry(cookie)?.error.get_or_insert(error);
        }
    }
    if chunk.done {
        let mut entry = input.take(cookie)?;
        if let Some(error) = entry.error.take() {
            entry.finish(Err(error));
            return Ok(());
        }
        let whole = match &entry.expect {
            Expect::Data { coverage, .. } => coverage.finish().map_err(|e| input.error(e)),
            Expect::Extents(extents) if extents.is_empty() => {
                Err(input.broken("a reply to a block status request without a status"))
            }
            _ => Ok(()),
        };
        entry.finish(whole.clone());
        return whole;
    }
    Ok(())
}

/// The stream of bytes from the server.
struct Input<'a> {
    shared: &'a Shared,
    buf: Box<[u8]>,
    /// What was received and not used is `buf[start..end]`.
    start: usize,
    end: usize,
}

impl Input<'_> {
    async fn header(&mut self) -> Result<ReplyHeader> {
        let headers = self.shared.headers;
        let lengths: &[usize] = if headers.are_extended() {
            &[ReplyHeader::EXTENDED_LEN]
        } else {
            &[ReplyHeader::SIMPLE_LEN, ReplyHeader::CHUNK_LEN]
        };
        for needed in lengths {
            self.fill(*needed).await?;
            let seen = &self.buf[self.start..self.end];
            let decoded = ReplyHeader::decode(seen, headers, self.shared.max_data);
            if let Some((header, used)) = decoded.map_err(|e| self.error(e))? {
                self.start += used;
                return Ok(header);
            }
        }
        Err(self.broken("a reply of unknown form"))
    }

    /// Waits until `needed` bytes are in the buffer.
    async fn fill(&mut self, needed: usize) -> Result<()> {
        if self.end - self.start < needed && self.buf.len() - self.start < needed {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < needed {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            }
            let n = {
                let room = &mut self.buf[self.end..];
                received(self.shared, self.shared.socket.readv(&mut [IoSliceMut::new(room)]).await)?
            };
            self.end += n;
        }
        Ok(())
    }

    /// Takes exactly `dst.len()` bytes.
    async fn copy(&mut self, dst: &mut [u8]) -> Result<()> {
        let known = dst.len().min(self.end - self.start);
        dst[..known].copy_from_slice(&self.buf[self.start..self.start + known]);
        self.start += known;
        let mut rest = &mut dst[known..];
        while !rest.is_empty() {
            // The buffer is empty here, so what follows the data can go to its front.
            let n = {
                let vectors = &mut [IoSliceMut::new(rest), IoSliceMut::new(&mut self.buf)];
                received(self.shared, self.shared.socket.readv(vectors).await)?
            };
            let into = n.min(rest.len());
            (self.start, self.end) = (0, n - into);
            rest = &mut rest[into..];
        }
        Ok(())
    }

    /// A payload that isn't data. Its length was checked against the codec's limit.
    async fn control(&mut self, length: u32) -> Result<Vec<u8>> {
        let mut payload = vec![0; length as usize];
        self.copy(&mut payload).await?;
        Ok(payload)
    }

    /// Fills a part of a read's buffer.
    async fn data(&mut self, cookie: u64, range: Range<usize>) -> Result<()> {
        let taken = match &mut self.entry(cookie)?.expect {
            Expect::Data { buf, .. } => buf.take(),
            _ => None,
        };
        let Some(mut taken) = taken else { return Err(self.broken("data for a request that takes none")) };
        let done = self.copy(&mut taken[range]).await;
        self.put_back(cookie, taken);
        done
    }

    fn put_back(&self, cookie: u64, taken: BufferMut) {
        if let Some(InFlight { expect: Expect::Data { buf, .. }, .. }) =
            self.shared.table.borrow_mut().get_mut(&cookie)
        {
            *buf = Some(taken);
        }
    }

    /// Where in the buffer of a read a chunk of its answer belongs.
    fn cover(&self, cookie: u64, offset: u64, length: u32) -> Result<Range<usize>> {
        let mut entry = self.entry(cookie)?;
        let Expect::Data { buf: Some(buf), coverage, chunks } = &mut entry.expect else {
            return Err(self.broken("data for a request that takes none"));
        };
        *chunks += 1;
        // Buffers of reads are at most `max_data` long.
        if *chunks > 64 + buf.len() as u32 / SMALLEST_CHUNK {
            return Err(self.broken("a read is answered in too many chunks"));
        }
        coverage.answer(offset, length).map_err(|e| self.error(e))
    }

    fn entry(&self, cookie: u64) -> Result<RefMut<'_, InFlight>> {
        RefMut::filter_map(self.shared.table.borrow_mut(), |table| table.get_mut(&cookie))
            .map_err(|_| self.broken("a reply to a request that was not made"))
    }

    fn take(&self, cookie: u64) -> Result<InFlight> {
        let entry = self.shared.table.borrow_mut().remove(&cookie);
        entry.ok_or_else(|| self.broken("a reply to a request that was not made"))
    }

    /// What a server's refusal of one request means here.
    fn refusal(&self, code: ErrorCode, message: &str) -> Error {
        let kind = match code {
            ErrorCode::Permission => ErrorKind::PermissionDenied,
            ErrorCode::NoSpace => ErrorKind::NoSpace,
            ErrorCode::Invalid | ErrorCode::Overflow => ErrorKind::InvalidInput,
            ErrorCode::NotSupported => ErrorKind::Unsupported,
            ErrorCode::Shutdown => {
                self.shared.retire();
                ErrorKind::Unavailable
            }
            _ => ErrorKind::Io,
        };
        if message.is_empty() {
            Error::new(kind, format!("the server answered: {code}"))
        } else {
            Error::new(kind, format!("the server answered: {code}: {message}"))
        }
    }

    fn broken(&self, what: &str) -> Error {
        let message = format!("{}: the server breaks the protocol: {what}", self.shared.name);
        Error::new(ErrorKind::Corrupt, message)
    }

    fn error(&self, e: ProtocolError) -> Error {
        protocol_error(e).context(&self.shared.name)
    }
}

/// Judges what a read of the socket gave.
fn received(shared: &Shared, n: std::io::Result<usize>) -> Result<usize> {
    match n {
        Ok(0) => {
            let message = format!("{}: the server closed the connection", shared.name);
            Err(Error::new(ErrorKind::Unavailable, message))
        }
        Ok(n) => {
            shared.last_received.set(Instant::now());
            Ok(n)
        }
        Err(e) => Err(Error::from_io(e, format!("receive a reply from {}", shared.name))),
    }
}
