//! The way between server and client: what it does to bytes, whatever they mean.

use crate::proxy::Shared;
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::time::Instant;

/// The longest piece that is passed on at once, in bytes.
pub(crate) const PIECE: usize = 64 << 10;

/// How many pieces may be on their way in one direction of a connection: what is sent at once in a test must fit.
const ON_THE_WAY: usize = 256;

/// How the way behaves. All of it is about what the server sends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Link {
    /// How long each byte is under way. What was sent together stays together.
    pub latency: Duration,
    /// Up to so much more, by chance. Nothing overtakes.
    pub jitter: Duration,
    /// Bytes per second of all connections together.
    pub rate: Option<NonZeroU64>,
    /// Each connection breaks when so many bytes have passed.
    pub cut_after: Option<u64>,
    /// Each byte whose number on its connection is a multiple of this arrives with a bit flipped. Of HTTP answers only the bodies' bytes count.
    pub corrupt_every: Option<NonZeroU64>,
}

/// Something on its way.
pub(crate) struct Parcel {
    pub(crate) bytes: Vec<u8>,
    /// Bits of it may be flipped.
    pub(crate) may_rot: bool,
}

/// Where what the server sends is put in.
pub(crate) struct Entrance {
    queue: Sender<(Instant, Parcel)>,
    shared: Arc<Shared>,
    last: Instant,
}

/// Where it comes out.
pub(crate) struct Exit {
    queue: Receiver<(Instant, Parcel)>,
    shared: Arc<Shared>,
    passed: u64,
    may_rot: u64,
}

/// One direction of one connection.
pub(crate) fn way(shared: &Arc<Shared>) -> (Entrance, Exit) {
    let (sender, receiver) = mpsc::channel(ON_THE_WAY);
    let entrance = Entrance { queue: sender, shared: shared.clone(), last: Instant::now() };
    (entrance, Exit { queue: receiver, shared: shared.clone(), passed: 0, may_rot: 0 })
}

impl Entrance {
    /// Sends bytes on their way.
    ///
    /// # Errors
    /// If the other end is gone.
    pub(crate) async fn send(&mut self, parcel: Parcel) -> io::Result<()> {
        let link = self.shared.link();
        let jitter = link.jitter.mul_f64(self.shared.chance());
        self.last = self.last.max(Instant::now() + link.latency + jitter);
        self.queue.send((self.last, parcel)).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Sends all that comes from `server`.
    ///
    /// # Errors
    /// If either end fails.
    pub(crate) async fn send_all(mut self, mut server: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        loop {
            let len = server.read(&mut piece).await?;
            if len == 0 {
                return Ok(());
            }
            self.send(Parcel { bytes: piece[..len].to_vec(), may_rot: true }).await?;
        }
    }
}

impl Exit {
    /// Hands everything out to `client`, until the other end is gone.
    ///
    /// # Errors
    /// If the client is gone, or the connection is to break here.
    pub(crate) async fn deliver(mut self, mut client: impl AsyncWrite + Unpin) -> io::Result<()> {
        while let Some((at, mut parcel)) = self.queue.recv().await {
            tokio::time::sleep_until(at).await;
            let mut rest = &mut parcel.bytes[..];
            while !rest.is_empty() {
                self.shared.flows().await;
                let link = self.shared.link();
                let mut len = rest.len();
                if let Some(rate) = link.rate {
                    // A twentieth of a second at a time, so that a trickle is one.
                    len = len.min(usize::try_from(rate.get() / 20).unwrap_or(len).max(1));
                    self.shared.wait_for_turn(len, rate).await;
                }
                let left = link.cut_after.map_or(u64::MAX, |after| after.saturating_sub(self.passed));
                len = len.min(usize::try_from(left).unwrap_or(len));
                if len == 0 {
                    self.shared.count_fault();
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                let (now, later) = rest.split_at_mut(len);
                if let (Some(every), true) = (link.corrupt_every, parcel.may_rot) {
                    for byte in &mut *now {
                        self.may_rot += 1;
                        if self.may_rot.is_multiple_of(every.get()) {
                            *byte ^= 1;
                            self.shared.count_fault();
                        }
                    }
                }
                client.write_all(now).await?;
                self.passed += len as u64;
                self.shared.count_bytes(len as u64);
                rest = later;
            }
        }
        client.shutdown().await
    }
}
