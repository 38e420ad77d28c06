//! The daemon in two processes ([`headwater_sandbox`]): what the broker holds of it, and how the data plane asks for it.
//!
//! The broker has the monitors. It hands each connection's way out to the data plane, and reads the way in itself: what it has read it
//! takes apart as the data plane will, tells the grants which files the operator named ([`words`]), and only then passes it on. So a file is
//! granted when the command that names it arrives, and nobody but the operator can say that the operator named it.
//!
//! - [`enter`] makes the two; [`Confined`] is what the data plane has of it.
//! - [`desk`]: how the data plane asks for a character device. [`broker`]: what answers there.
//! - [`words`]: which files a command or an option names.

mod broker;
mod desk;
mod words;

pub(super) use self::desk::Desk;
use super::options::{Line, Setting, Wish};
use crate::failure::{Failure, Outcome};
use headwater_sandbox::{DataPlane, Side, receive_packet};
use std::collections::VecDeque;
use std::os::fd::{BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// What a data plane has of its sandbox. Without one it has nothing, and does all by itself.
pub(super) struct Confined {
    plane: Option<DataPlane>,
    /// For the character devices of the command line, in its order.
    desks: VecDeque<OwnedFd>,
}

/// Tells the broker that the terminal is to be left.
const DETACH: &[u8] = b"detach";

/// Makes the sandbox that `line` asks for. Returns in the data plane only: the broker's process runs, and ends, in here.
///
/// # Errors
/// If one is demanded and can't be had.
pub(super) fn enter(line: &Line) -> Outcome<Confined> {
    let none = Confined { plane: None, desks: VecDeque::new() };
    if line.sandbox == Wish::Off {
        return Ok(none);
    }
    let cannot = |err: rustix::io::Errno| Failure::new(format!("cannot make a socket: {err}"));
    let chardevs = line.settings.iter().filter(|setting| matches!(setting, Setting::Chardev(..)));
    let pairs: Vec<_> = chardevs.map(|_| desk::pair()).collect::<Result<_, _>>().map_err(cannot)?;
    let (ours, theirs): (VecDeque<_>, Vec<_>) = pairs.into_iter().unzip();
    match headwater_sandbox::split() {
        Ok(Side::DataPlane(plane)) => Ok(Confined { plane: Some(plane), desks: ours }),
        Ok(Side::Broker(broker)) => {
            drop(ours);
            broker::run(broker, line, theirs)
        }
        Err(why) if line.sandbox == Wish::On => Err(Failure::new(format!("--sandbox on: {why}"))),
        Err(why) => {
            tracing::info!("no sandbox: {why}");
            Ok(none)
        }
    }
}

impl Confined {
    /// Gives up what isn't needed. The engine's ring must be there, and no thread.
    ///
    /// # Errors
    /// If that is impossible, although there is a broker.
    pub(super) fn lock_down(&mut self) -> Outcome {
        let Some(plane) = &mut self.plane else { return Ok(()) };
        plane.lock_down().map_err(|why| {
            Failure::new(format!("cannot enter the sandbox: {why}; --sandbox off runs without"))
        })
    }

    /// The desk of the next character device of the command line.
    ///
    /// # Errors
    /// If the system has no room for it.
    pub(super) fn next_desk(&mut self) -> std::io::Result<Option<Desk>> {
        self.desks.pop_front().map(Desk::new).transpose()
    }

    /// Completes if the broker ends, which it doesn't do by itself; never without one.
    ///
    /// # Errors
    /// If it can't be watched.
    pub(super) fn broken(&self) -> Outcome<impl Future<Output = ()> + use<>> {
        let watched = match &self.plane {
            Some(plane) => Some(
                watch(plane.life()).map_err(|err| Failure::new(format!("cannot watch the broker: {err}")))?,
            ),
            None => None,
        };
        Ok(async move {
            match watched {
                // It sends nothing, so that whatever there is to be had is its end.
                Some(life) => drop(life.async_io(Interest::READABLE, || receive_packet(&life, 1)).await),
                None => std::future::pending().await,
            }
        })
    }

    /// Leaves the terminal, as this process does.
    pub(super) fn detach(&self) {
        if let Some(plane) = &self.plane {
            // If it is gone, so is its hold of the terminal.
            let _ = headwater_sandbox::send_packet(plane.life(), DETACH, &[]);
        }
    }
}

fn watch(life: BorrowedFd<'_>) -> std::io::Result<UnixStream> {
    let life = life.try_clone_to_owned()?;
    rustix::io::ioctl_fionbio(&life, true)?;
    desk::unix_stream(life)
}

impl Drop for Confined {
    fn drop(&mut self) {
        self.desks.clear();
        if let Some(plane) = self.plane.take() {
            plane.end();
        }
    }
}
