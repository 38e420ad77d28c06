//! Requests on their way in: one `recv` may bring many, and the data of a write go straight into the buffer that the
//! disk will get.

use std::io;
use std::task::{Context, Poll, ready};

use headwater_block::{Buffer, BufferMut};
use headwater_nbd::request::Terms;
use headwater_nbd::{Command, ErrorCode, MetaContext, ProtocolError, Request, StatusFilter};

use super::socket::Socket;

/// How many bytes are received at once, at most. Holds 2340 requests, or 2048 with extended headers, or the data of 15 writes of 4 KiB, which are cheaper to
/// copy once more than to receive one by one.
const RECEIVE_BUFFER: usize = 64 << 10;

/// A request as it came.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// To be carried out; a write comes with its data.
    Request(Request, Option<Buffer>),
    /// A block status of some of the contexts only.
    Status(StatusFilter),
    /// To be answered with an error.
    Bad(Request, ErrorCode),
}

/// What the next bytes belong to.
enum Expect {
    Request,
    /// The data of a write, or the contexts of a block status: so many bytes of the buffer are filled.
    Data(Request, BufferMut, usize),
    /// The data of a write that was refused.
    Refuse(Request, ErrorCode, u32),
}

/// The receiving side of a session.
pub(crate) struct Receiver {
    terms: Terms,
    /// Those that were negotiated.
    contexts: Vec<MetaContext>,
    buffer: BufferMut,
    /// The bytes of `buffer` that are received and not yet used.
    start: usize,
    end: usize,
    expect: Expect,
}

/// The outcome of a look at the bytes that are there.
#[derive(Debug)]
pub(crate) enum Next {
    /// A whole request, with its data.
    Incoming(Incoming),
    /// There is a request, but no room for it.
    Full,
    /// More bytes must be received first.
    More,
}

impl Receiver {
    /// A receiver that has `received` already: what came with the last bytes of the negotiation.
    pub(crate) fn new(terms: Terms, contexts: Vec<MetaContext>, received: &[u8]) -> Self {
        let mut buffer = BufferMut::new(RECEIVE_BUFFER.max(received.len()));
        buffer[..received.len()].copy_from_slice(received);
        Self { terms, contexts, buffer, start: 0, end: received.len(), expect: Expect::Request }
    }

    /// Whether the client left off in the middle of a request.
    pub(crate) fn is_mid_request(&self) -> bool {
        self.start != self.end || !matches!(self.expect, Expect::Request)
    }

    /// Takes the next request from the bytes that are there. `admit` says whether one that holds so many bytes of memory
    /// may be taken; if not, it stays where it is and the call is to be repeated later.
    ///
    /// # Errors
    /// The client has lost step and is to be cut off.
    pub(crate) fn next(&mut self, admit: impl Fn(usize) -> bool) -> Result<Next, ProtocolError> {
        loop {
            let there = &self.buffer[self.start..self.end];
            match std::mem::replace(&mut self.expect, Expect::Request) {
                Expect::Request => {
                    let Some(request) = Request::decode(there, self.terms.headers)? else {
                        return Ok(Next::More);
                    };
                    let payload = request.payload_len(&self.terms)?;
                    let verdict =
                        request.check(&self.terms).and_then(|()| self.check_filter(&request, payload));
                    if !admit(cost(&request, verdict.is_ok())) {
                        return Ok(Next::Full);
                    }
                    self.start += Request::len_of(self.terms.headers);
                    match (verdict, payload) {
                        (Ok(()), 0) => return Ok(Next::Incoming(Incoming::Request(request, None))),
                        (Ok(()), length) => {
                            self.expect = Expect::Data(request, BufferMut::new(length as usize), 0);
                        }
                        (Err(code), 0) => return Ok(Next::Incoming(Incoming::Bad(request, code))),
                        (Err(code), length) => self.expect = Expect::Refuse(request, code, length),
                    }
                }
                Expect::Data(request, mut data, filled) => {
                    let count = there.len().min(data.len() - filled);
                    data[filled..filled + count].copy_from_slice(&there[..count]);
                    self.start += count;
                    let filled = filled + count;
                    if filled == data.len() {
                        return Ok(Next::Incoming(self.with_payload(request, data.freeze())));
                    }
                    self.expect = Expect::Data(request, data, filled);
                    return Ok(Next::More);
                }
                Expect::Refuse(request, code, left) => {
                    let count = there.len().min(left as usize);
                    self.start += count;
                    if count == left as usize {
                        return Ok(Next::Incoming(Incoming::Bad(request, code)));
                    }
                    self.expect = Expect::Refuse(request, code, left - count as u32);
                    return Ok(Next::More);
                }
            }
        }
    }

    /// A payload of a block status that can't be right is not kept.
    fn check_filter(&self, request: &Request, payload: u32) -> Result<(), ErrorCode> {
        let most = StatusFilter::longest_payload(self.contexts.len());
        if request.command == Command::BlockStatus && payload as usize > most {
            return Err(ErrorCode::Invalid);
        }
        Ok(())
    }

    fn with_payload(&self, request: Request, payload: Buffer) -> Incoming {
        if request.command != Command::BlockStatus {
            return Incoming::Request(request, Some(payload));
        }
        let chosen = |id| self.contexts.iter().any(|context| context.id == id);
        match StatusFilter::decode(&request, &payload, chosen, &self.terms) {
            Ok(filter) => Incoming::Status(filter),
            Err(code) => Incoming::Bad(request, code),
        }
    }

    /// Receives once, after [`Receiver::next`] asked for more. Ready with `false` if the client will send no more.
    pub(crate) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        socket: &mut Socket,
    ) -> Poll<io::Result<bool>> {
        if let Expect::Data(_, data, filled) = &mut self.expect {
            let count = ready!(socket.poll_read(cx, &mut data[*filled..]))?;
            *filled += count;
            return Poll::Ready(Ok(count > 0));
        }
        // Only a part of one request can be left over, so that moving it to the front is cheap.
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let count = ready!(socket.poll_read(cx, &mut self.buffer[self.end..]))?;
        self.end += count;
        Poll::Ready(Ok(count > 0))
    }
}

/// Memory that a request holds until its reply is written, in bytes.
pub(crate) fn memory_held(incoming: &Incoming) -> usize {
    match incoming {
        Incoming::Request(request, _) => cost(request, true),
        Incoming::Status(filter) => cost(&filter.request, true),
        Incoming::Bad(request, _) => cost(request, false),
    }
}

fn cost(request: &Request, valid: bool) -> usize {
    /// A request's own state, and a reply without data: an error with its words, or a block status.
    const CONTROL: usize = 1 << 10;
    match request.command {
        Command::Read | Command::Write if valid => CONTROL + request.length as usize,
        _ => CONTROL,
    }
}

#[cfg(test)]
mod tests;
