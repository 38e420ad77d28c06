//! Replies on their way out: encoded, queued, and written many at a time.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};

use headwater_block::Buffer;
use headwater_nbd::reply;
use headwater_nbd::{Encoded, ErrorCode, ReplyTo};

use super::socket::Socket;

/// Most pieces of memory in one write. The kernel takes 1024; at 64 the cost of a call is spread enough.
const MAX_SLICES: usize = 64;

/// What follows the fixed beginning.
enum Tail {
    Nothing,
    Data(Buffer),
    Bytes(Vec<u8>),
}

/// One reply, encoded. The data of a read stay in the buffer in which the disk left them.
pub(crate) struct Reply {
    head: Encoded,
    tail: Tail,
}

impl Reply {
    /// Success without data. A simple reply is allowed even where structured ones were negotiated, except for reads; but not with extended
    /// headers.
    pub(crate) fn success(to: ReplyTo) -> Self {
        let head = if to.headers.are_extended() {
            reply::encode_done(to)
        } else {
            reply::encode_simple(to.cookie, None)
        };
        Self { head, tail: Tail::Nothing }
    }

    /// A failure; the words reach the client only if replies are structured.
    pub(crate) fn failure(to: ReplyTo, code: ErrorCode, words: &str) -> Self {
        if !to.headers.are_structured() {
            return Self { head: reply::encode_simple(to.cookie, Some(code)), tail: Tail::Nothing };
        }
        let mut bytes = Vec::new();
        reply::encode_error(&mut bytes, to, code, words);
        Self::chunks(bytes)
    }

    /// All data of a read at `offset`.
    pub(crate) fn data(to: ReplyTo, offset: u64, data: Buffer) -> Self {
        match (to.headers.are_structured(), u32::try_from(data.len())) {
            (false, _) => Self { head: reply::encode_simple(to.cookie, None), tail: Tail::Data(data) },
            // A data chunk must not be empty.
            (true, Ok(0)) => Self { head: reply::encode_done(to), tail: Tail::Nothing },
            (true, Ok(length)) => {
                Self { head: reply::encode_data_prefix(to, offset, length, true), tail: Tail::Data(data) }
            }
            (true, Err(_)) => Self::failure(to, ErrorCode::Overflow, "the read is too long"),
        }
    }

    /// A structured read of which all bytes are zero.
    pub(crate) fn hole(to: ReplyTo, offset: u64, length: u32) -> Self {
        Self { head: reply::encode_hole(to, offset, length, true), tail: Tail::Nothing }
    }

    /// Chunks that were encoded already.
    pub(crate) fn chunks(bytes: Vec<u8>) -> Self {
        Self { head: Encoded::default(), tail: Tail::Bytes(bytes) }
    }

    fn parts(&self) -> [&[u8]; 2] {
        let tail = match &self.tail {
            Tail::Nothing => &[],
            Tail::Data(data) => &data[..],
            Tail::Bytes(bytes) => bytes,
        };
        [&self.head, tail]
    }

    fn len(&self) -> usize {
        self.parts().iter().map(|part| part.len()).sum()
    }
}

/// Replies in the order in which they became ready. The protocol asks for no order.
#[derive(Default)]
pub(crate) struct Replies {
    /// With what each gives back to the session's budget when it is written.
    queue: VecDeque<(Reply, usize)>,
    /// How much of the first is written.
    written: usize,
}

impl Replies {
    /// Whether all replies were written.
    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many replies are not written whole.
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Queues a reply that holds `cost` of the budget until it is written.
    pub(crate) fn push(&mut self, reply: Reply, cost: usize) {
        self.queue.push_back((reply, cost));
    }

    /// Writes once; returns what that gives back to the budget. Ready only if some bytes went out.
    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut Socket,
    ) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut used = 0;
        let mut skip = self.written;
        'fill: for (reply, _) in &self.queue {
            for part in reply.parts() {
                let rest = &part[skip.min(part.len())..];
                skip -= part.len() - rest.len();
                if rest.is_empty() {
                    continue;
                }
                if used == MAX_SLICES {
                    break 'fill;
                }
                slices[used] = IoSlice::new(rest);
                used += 1;
            }
        }
        let count = ready!(socket.poll_write(cx, &slices[..used]))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.written += count;
        let mut given_back = 0;
        while let Some((reply, cost)) = self.queue.front() {
            let len = reply.len();
            if self.written < len {
                break;
            }
            self.written -= len;
            given_back += cost;
            self.queue.pop_front();
        }
        Poll::Ready(Ok(given_back))
    }
}
