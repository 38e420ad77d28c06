//! Takes the kernel's requests and answers them, as they come, until the file is unmounted or is to go.

use super::handler::Handler;
use crate::kick::Kick;
use crate::stop::StopListener;
use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::{Abort, Buffer};
use headwater_fuse::{Answer, Connection, Errno, Ticket};
use std::cell::Cell;
use std::future::{pending, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::task::coop::consume_budget;

/// Most requests that are carried out at once. The others wait in the kernel.
const MAX_REQUESTS: usize = 64;

/// What an unmounted file system's end has is an error.
const INTEREST: Interest = Interest::READABLE.add(Interest::ERROR);

/// Where the disk's thread hears that there is something to do.
pub(crate) struct Wakers {
    /// The connection's file. For the event loop it is a socket like another: it can be waited for.
    file: UnixStream,
    ring: Option<Kick>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    File,
    Ring,
}

/// How many requests have come, and how.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) over_ring: Cell<u64>,
    pub(crate) through_file: Cell<u64>,
}

impl Wakers {
    /// Of a connection, with the descriptor that came with it.
    ///
    /// # Errors
    /// If they can't be watched.
    pub(crate) fn new(connection: &Connection, ring: Option<OwnedFd>) -> io::Result<Self> {
        let file = connection.file().try_clone_to_owned()?;
        let file = UnixStream::from_std(file.into())?;
        Ok(Self { file, ring: ring.map(Kick::new).transpose()? })
    }

    async fn wait(&self) -> io::Result<Woken> {
        let ring = async {
            match &self.ring {
                Some(kick) => kick.wait().await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            kicked = ring => kicked.map(|()| Woken::Ring),
            ready = self.file.ready(INTEREST) => {
                ready?;
                // From now on the next wake-up is waited for: until then it is read until there is nothing any more.
                let _ = self.file.try_io::<()>(INTEREST, || Err(io::ErrorKind::WouldBlock.into()));
                Ok(Woken::File)
            }
        }
    }
}

/// Carries requests out until no more can come or are wanted, and all that were begun are done. `leaves` ends those that are held then. The file
/// gives errors afterwards, if it is still there.
///
/// # Errors
/// If the connection can't be used any more.
pub(crate) async fn serve(
    handler: &Handler,
    mut connection: Connection,
    wakers: &Wakers,
    counts: &Counts,
    stop: &StopListener,
    leaves: &Abort,
) -> io::Result<()> {
    let mut running = FuturesUnordered::new();
    let mut listening = false;
    let ended = loop {
        // Requests that need no waiting must not keep the thread from everybody else.
        consume_budget().await;
        if !listening {
            connection.silence();
        }
        let mut came = false;
        let polled = connection.poll(MAX_REQUESTS - running.len(), |arrived| {
            came = true;
            let count = if arrived.ticket.is_of_ring() { &counts.over_ring } else { &counts.through_file };
            count.set(count.get() + 1);
            // An entry of the ring keeps the bytes until it is answered, but a change's bytes must be its own and lie as the disk wants them.
            let data = Buffer::copy_of(arrived.data);
            running.push(handler.handle(arrived.ticket, arrived.operation, data));
        });
        match polled {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(error) => break Err(error),
        }
        let full = running.len() == MAX_REQUESTS;
        if connection.listen() && !full && (came || !listening) {
            listening = true;
            continue;
        }
        listening = false;
        tokio::select! {
            biased;
            () = poll_fn(|cx| stop.poll(cx)) => break Ok(()),
            Some(done) = running.next(), if !running.is_empty() => {
                let mut next = Some(done);
                while let Some((ticket, answer)) = next {
                    tell(&mut connection, ticket, &answer);
                    next = running.next().now_or_never().flatten();
                }
            }
            woken = wakers.wait(), if !full => match woken {
                Ok(Woken::File) => connection.kick(),
                Ok(Woken::Ring) => {}
                Err(error) => break Err(error),
            },
        }
    };
    leaves.abort();
    // What was begun is done, and whoever still waits hears of it.
    while let Some((ticket, answer)) = running.next().await {
        tell(&mut connection, ticket, &answer);
    }
    // For nothing but these answers; if they can't go any more, then what is left is an error for those who wait.
    let _ = connection.poll(0, |_| ());
    ended
}

fn tell(connection: &mut Connection, ticket: Ticket, answer: &Result<Answer<Buffer>, Errno>) {
    if let Err(error) = connection.answer(ticket, answer) {
        tracing::warn!("the kernel doesn't take the answer to a FUSE request: {error}");
    }
}
