//! A connection after negotiation: one owner that reads, starts requests, collects replies and writes.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, Stream};
use headwater_block::Abort;
use headwater_nbd::{Command, ProtocolError};
use tokio::time::Sleep;

use super::receive::{Incoming, Next, Receiver, memory_held};
use super::replies::{Replies, Reply};
use super::socket::Socket;
use crate::stop::StopListener;

/// Most memory that one client's requests and replies hold, in bytes. The longest request just fits.
pub(crate) const MAX_BYTES_IN_FLIGHT: usize = 32 << 20;

/// Most requests of one client that are being carried out or whose reply is not written yet.
pub(crate) const MAX_REQUESTS: usize = 1024;

/// How long a client that left, or that is told to, may take to read its last replies.
const LINGER: Duration = Duration::from_secs(5);

/// How often it is looked whether a client is still there that has sent more than there is room for, and so isn't read from.
const LOOK: Duration = Duration::from_secs(1);

/// Why a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The client said goodbye, or closed between two requests.
    Left,
    /// The client closed in the middle of a request.
    LeftMidRequest,
    /// The server was told to stop.
    Stopped,
    /// The client broke the protocol.
    CutOff(ProtocolError),
    /// The connection failed.
    Broken(io::Error),
}

/// How far a session is.
enum Phase {
    /// Requests are received.
    Serving,
    /// No more requests; what was started is finished and answered.
    Leaving(End),
    /// Nobody hears the answers; what was started is finished all the same.
    Deaf(End),
}

/// A connection after negotiation. `start` makes the future of a request; with the request it gets what the request costs,
/// and its future gives that back with the reply.
pub(crate) struct Session<'a, Start, Handling> {
    socket: Socket,
    receiver: Receiver,
    start: Start,
    running: FuturesUnordered<Handling>,
    replies: Replies,
    /// What requests and replies hold of [`MAX_BYTES_IN_FLIGHT`].
    held: usize,
    /// Whether this poll gives others a chance to complete more requests before replies are written.
    yielded: bool,
    stop: &'a StopListener,
    /// Thrown when the client leaves, is sent away or is cut off: nothing is held for it any more.
    leaves: Rc<Abort>,
    /// Whether nothing of what was written is on its way to the kernel.
    flushed: bool,
    phase: Phase,
    linger: Option<Pin<Box<Sleep>>>,
    look: Option<Pin<Box<Sleep>>>,
}

impl<'a, Start, Handling> Session<'a, Start, Handling>
where
    Start: Fn(Incoming, usize) -> Handling,
    Handling: Future<Output = (Reply, usize)>,
{
    /// A session that first sends `replies` and serves until its client leaves or `stop` orders the end.
    pub(crate) fn new(
        socket: Socket,
        receiver: Receiver,
        replies: Replies,
        stop: &'a StopListener,
        leaves: Rc<Abort>,
        start: Start,
    ) -> Self {
        Self {
            socket,
            receiver,
            start,
            running: FuturesUnordered::new(),
            replies,
            held: 0,
            yielded: false,
            stop,
            leaves,
            flushed: true,
            phase: Phase::Serving,
            linger: None,
            look: None,
        }
    }

    /// Serves. Must be driven to its end: dropping it would drop requests that were started.
    pub(crate) async fn run(mut self) -> End {
        poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            self.collect(cx);
            if !self.replies.is_empty() {
                if !std::mem::replace(&mut self.yielded, true) {
                    // Whoever is scheduled behind us (the file engine, above all) may complete more requests, whose
                    // replies then leave with the same system call.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                self.write(cx);
            }
            if self.replies.is_empty() {
                self.yielded = false;
            }
            self.flush(cx);
            if !self.receive(cx) {
                break;
            }
        }
        self.poll_end(cx)
    }

    /// Queues the replies that are ready.
    fn collect(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some((reply, cost))) = Pin::new(&mut self.running).poll_next(cx) {
            if matches!(self.phase, Phase::Deaf(_)) {
                self.held -= cost;
            } else {
                self.replies.push(reply, cost);
            }
        }
    }

    /// Writes replies until none is left or the socket is full.
    fn write(&mut self, cx: &mut Context<'_>) {
        while !self.replies.is_empty() {
            match self.replies.poll_write(cx, &mut self.socket) {
                Poll::Ready(Ok(given_back)) => self.held -= given_back,
                Poll::Ready(Err(error)) => return self.give_up(End::Broken(error)),
                Poll::Pending => return,
            }
        }
    }

    /// Sees to it that what was written goes out.
    fn flush(&mut self, cx: &mut Context<'_>) {
        if matches!(self.phase, Phase::Deaf(_)) {
            return;
        }
        match self.socket.poll_flush(cx) {
            Poll::Ready(Ok(())) => self.flushed = true,
            Poll::Ready(Err(error)) => self.give_up(End::Broken(error)),
            Poll::Pending => self.flushed = false,
        }
    }

    /// Starts requests that have come; true if there is something new to poll.
    fn receive(&mut self, cx: &mut Context<'_>) -> bool {
        if !matches!(self.phase, Phase::Serving) {
            return false;
        }
        if self.stop.poll(cx).is_ready() {
            self.leave(End::Stopped);
            return false;
        }
        let mut started = false;
        loop {
            let (held, requests) = (self.held, self.running.len() + self.replies.len());
            // A single request is always taken, so that those who wait for room know that some reply will make it.
            let admit =
                |cost| requests == 0 || (requests < MAX_REQUESTS && held + cost <= MAX_BYTES_IN_FLIGHT);
            match self.receiver.next(admit) {
                Ok(Next::Incoming(Incoming::Request(request, _)))
                    if request.command == Command::Disconnect =>
                {
                    self.leave(End::Left);
                    return started;
                }
                Ok(Next::Incoming(incoming)) => {
                    let cost = memory_held(&incoming);
                    self.held += cost;
                    self.running.push((self.start)(incoming, cost));
                    started = true;
                }
                Ok(Next::Full) => {
                    self.look_for_end(cx);
                    return started;
                }
                // What has come is started before more is received.
                Ok(Next::More) if started => return true,
                Ok(Next::More) => match self.receiver.poll_receive(cx, &mut self.socket) {
                    Poll::Ready(Ok(true)) => {}
                    Poll::Ready(Ok(false)) => {
                        let torn = self.receiver.is_mid_request();
                        self.leave(if torn { End::LeftMidRequest } else { End::Left });
                        return false;
                    }
                    Poll::Ready(Err(error)) => {
                        self.give_up(End::Broken(error));
                        return false;
                    }
                    Poll::Pending => return false,
                },
                Err(error) => {
                    self.give_up(End::CutOff(error));
                    return started;
                }
            }
        }
    }

    /// Ends what is held for a client that is gone before it could be read from again: nothing else would tell.
    fn look_for_end(&mut self, cx: &mut Context<'_>) {
        let look = self.look.get_or_insert_with(|| Box::pin(tokio::time::sleep(LOOK)));
        if look.as_mut().poll(cx).is_ready() {
            self.look = None;
            if self.socket.has_ended() {
                self.leaves.abort();
            } else {
                cx.waker().wake_by_ref();
            }
        }
    }

    /// Takes no more requests. What was started is answered.
    fn leave(&mut self, why: End) {
        self.leaves.abort();
        self.phase = Phase::Leaving(why);
    }

    /// Closes the connection towards the client; requests that were started go on.
    fn give_up(&mut self, why: End) {
        self.leaves.abort();
        self.socket.cut();
        self.replies = Replies::default();
        self.phase = Phase::Deaf(why);
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let may_end = self.running.is_empty() && self.replies.is_empty();
        match &mut self.phase {
            Phase::Serving => Poll::Pending,
            Phase::Leaving(why) if may_end && self.flushed => {
                self.socket.say_end(cx);
                Poll::Ready(std::mem::replace(why, End::Left))
            }
            Phase::Deaf(why) if may_end => Poll::Ready(std::mem::replace(why, End::Left)),
            Phase::Deaf(_) => Poll::Pending,
            Phase::Leaving(_) => {
                let linger = self.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER)));
                ready!(linger.as_mut().poll(cx));
                self.give_up(End::Broken(io::ErrorKind::TimedOut.into()));
                self.poll_end(cx)
            }
        }
    }
}

#[cfg(test)]
mod tests;
