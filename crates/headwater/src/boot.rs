//! A virtual machine that starts on a disk which is still elsewhere: what `headwater boot` does.
//!
//! The disk is served to one machine, through shared memory (vhost-user-blk) where the processor runs the guest, while its data stream in. The two end in any order: a machine that
//! is still at work when everything has been copied keeps its disk, and a stream that isn't done when the machine ends is interrupted,
//! to go on the next time. An interruption is passed on to the machine: the first asks, the second doesn't.

mod machine;

use self::machine::Machine;
use crate::cli::boot::BootArgs;
use crate::cli::stream::StreamArgs;
use crate::display::Display;
use crate::failure::{Failure, Outcome, code};
use crate::runtime::{self, Interrupts};
use crate::session::{Ending, Session};
use crate::shell;
use crate::stream::control;
use rustix::process::{Pid, Signal};
use std::path::PathBuf;
use std::process::{Child, ExitStatus};

/// Carries out the command.
///
/// # Errors
/// If the disk can't be had, or the machine fails.
pub fn run(args: BootArgs) -> Outcome {
    let program = machine::find(args.qemu.as_deref())?;
    let disk = match &args.disk {
        Some(disk) => disk.clone(),
        None => PathBuf::from(local_name(&args.source)?),
    };
    let directory = tempfile::Builder::new().prefix("headwater-").tempdir();
    let directory =
        directory.map_err(|err| Failure::new(format!("cannot make a directory for the socket: {err}")))?;
    let socket = directory.path().join("disk.sock");
    let machine = Machine {
        program,
        kvm: machine::has_kvm(),
        memory: args.memory,
        cpus: args.cpus,
        socket,
        more: args.machine.clone(),
    };
    let mut stream = args.stream(disk);
    stream.serve.push(machine.address());
    let again = shell::line(std::env::args());
    runtime::run(boot(&stream, machine, &again))
}

async fn boot(args: &StreamArgs, machine: Machine, again: &str) -> Outcome {
    let mut interrupts = Interrupts::catch()?;
    // The terminal is the machine's.
    let display = Display::quiet();
    let mut session = tokio::select! {
        session = Session::open(args, &display) => session?,
        () = interrupts.next() => return Err(Failure::silent(code::INTERRUPTED)),
    };
    let control = match control(args, &session) {
        Ok(control) => control,
        Err(failure) => return session.close().await.and(Err(failure)),
    };
    let outcome = attend(&mut session, args, machine, &display, &mut interrupts, again).await;
    let closed = session.close().await;
    drop(control);
    outcome.and(closed)
}

/// Runs the machine while the disk streams, until the machine has ended.
async fn attend(
    session: &mut Session,
    args: &StreamArgs,
    machine: Machine,
    display: &Display,
    interrupts: &mut Interrupts,
    again: &str,
) -> Outcome {
    let child = machine.start()?;
    let pid = Pid::from_child(&child);
    let mut ended = std::pin::pin!(end_of(child));
    let (job, watch) = (session.job(), session.watch());
    let mut interrupted = false;
    let status = {
        let mut streaming = std::pin::pin!(session.stream(display, interrupts));
        tokio::select! {
            status = &mut ended => {
                if let Some(job) = job {
                    // A stream that is over by now has nothing to be told.
                    let _ = job.request_cancel();
                    streaming.await;
                }
                Some(status)
            }
            ending = &mut streaming => {
                match ending {
                    Ending::Completed => display.say(&crate::stream::done(args)),
                    // The machine keeps its disk.
                    Ending::Failed(err) => display.say(&format!("headwater: {err}")),
                    Ending::Cancelled => display.say("the stream was cancelled; the machine keeps its disk"),
                    Ending::Interrupted => {
                        interrupted = true;
                        ask_to_end(pid, display);
                    }
                }
                None
            }
        }
    };
    let status = match status {
        Some(status) => status,
        None => loop {
            tokio::select! {
                status = &mut ended => break status,
                () = interrupts.next() => {
                    if interrupted {
                        kill(pid, Signal::KILL);
                    } else {
                        interrupted = true;
                        ask_to_end(pid, display);
                    }
                }
            }
        },
    };
    let left = watch.status();
    if left.state != "completed" {
        display.say(&format!(
            "{} of {} bytes have been copied; {} is consistent, and goes on with: {again}",
            left.copied,
            left.total,
            args.disk.display()
        ));
    }
    match status? {
        _ if interrupted => Err(Failure::silent(code::INTERRUPTED)),
        status if status.success() => Ok(()),
        status => Err(Failure::new(format!("the machine failed: {status}"))),
    }
}

/// Asks the machine to end.
fn ask_to_end(pid: Pid, display: &Display) {
    display.say("waiting for the machine to end; interrupt again to end it by force");
    kill(pid, Signal::TERM);
}

/// Sends the machine a signal. One that is gone needs none.
fn kill(pid: Pid, signal: Signal) {
    let _ = rustix::process::kill_process(pid, signal);
}

async fn end_of(mut child: Child) -> Outcome<ExitStatus> {
    let waited = tokio::task::spawn_blocking(move || child.wait()).await;
    let status = waited.map_err(|lost| Failure::new(format!("a worker thread has ended: {lost}")))?;
    status.map_err(|err| Failure::new(format!("cannot wait for the machine: {err}")))
}

/// The name of the disk that is made of `source`, when it isn't given.
fn local_name(source: &str) -> Outcome<String> {
    let path = source.split(['?', '#']).next().unwrap_or_default();
    let name = path.rsplit('/').next().unwrap_or_default();
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    if stem.is_empty() || (path.contains("://") && path.matches('/').count() < 3) {
        return Err(Failure::new(format!(
            "{source} has no name from which the disk's would follow: say DISK"
        )));
    }
    Ok(format!("{stem}.local.qcow2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_has_the_sources_name() {
        let name = |source: &str| local_name(source).ok();
        assert_eq!(
            name("https://images.example/debian-12.qcow2?x=1").as_deref(),
            Some("debian-12.local.qcow2")
        );
        assert_eq!(name("/srv/golden").as_deref(), Some("golden.local.qcow2"));
        assert_eq!(name("nbd://store.example/golden").as_deref(), Some("golden.local.qcow2"));
        for nameless in ["nbd://store.example", "nbd://store.example/", "nbd+unix:///?socket=/run/x"] {
            assert_eq!(name(nameless), None, "{nameless}");
        }
    }
}
