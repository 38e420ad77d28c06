//! A stream from start to end: what `headwater stream` does, and the demonstration with it.

use crate::cli::stream::StreamArgs;
use crate::confine::Writes;
use crate::control::{Command, ControlSocket, Handler};
use crate::display::Display;
use crate::failure::{Failure, Outcome, code};
use crate::progress::Status;
use crate::runtime::{self, Interrupts};
use crate::session::{Ending, Session};
use crate::shell;
use headwater_job::Status as JobStatus;
use std::rc::Rc;
use std::time::Duration;

/// Carries out the command.
///
/// # Errors
/// See the exit codes of the command.
pub fn run(args: StreamArgs) -> Outcome {
    let copy = &args.copy;
    Writes::default()
        .file(&args.disk)
        .allowed(&copy.open.allow_backing)
        .addresses(&args.serve)
        .directory(args.state_dir.as_deref())
        .directory(copy.cache_dir.as_deref())
        .optional(copy.control.as_deref())
        .optional(copy.record_boot_trace.as_deref())
        .confine();
    runtime::run(async move {
        let mut interrupts = Interrupts::catch()?;
        let display = Display::choose(args.json);
        let again = shell::line(std::env::args());
        stream(&args, &display, &mut interrupts, &again).await
    })
}

/// Streams as `args` say. `again` is the command line that resumes.
async fn stream(args: &StreamArgs, display: &Display, interrupts: &mut Interrupts, again: &str) -> Outcome {
    let opening = Session::open(args, display);
    let mut session = tokio::select! {
        session = opening => session.inspect_err(|failure| tell_failure(failure, args, display))?,
        () = interrupts.next() => {
            display.say(&format!("interrupted before anything was streamed; start with: {again}"));
            return Err(Failure::silent(code::INTERRUPTED));
        }
    };
    let control = match control(args, &session) {
        Ok(control) => control,
        Err(failure) => return session.close().await.and(Err(failure)),
    };
    let nothing_to_do = session.job().is_none();
    let ending = session.stream(display, interrupts).await;
    let disk = args.disk.display();
    let stopped =
        |how: &str| format!("{how}; {disk} is consistent and keeps what was copied; resume with: {again}");
    match &ending {
        Ending::Completed if nothing_to_do => {
            display.finish(Status { result: Some("completed"), ..session.watch().status() })
        }
        Ending::Completed => display.say(&done(args)),
        Ending::Interrupted => display.say(&stopped("interrupted")),
        Ending::Cancelled => display.say(&stopped("cancelled")),
        Ending::Failed(_) => display.say(&stopped("the stream ended with an error")),
    }
    // However the copying ended, clients keep their disk: a guest must not lose it because a source failed.
    if session.is_serving() && !args.exit_when_done && !matches!(ending, Ending::Interrupted) {
        if let Ending::Failed(err) = &ending {
            display.say(&format!("headwater: {err}"));
        }
        display.say("the disk stays served until headwater is interrupted");
        interrupts.next().await;
    }
    let closed = close(session, args, display, interrupts).await;
    drop(control);
    match ending {
        Ending::Completed => closed,
        Ending::Interrupted => closed.and(Err(Failure::silent(code::INTERRUPTED))),
        Ending::Cancelled => closed.and(Err(Failure::silent(code::CANCELLED))),
        Ending::Failed(err) => Err(err.into()),
    }
}

/// The control socket, if one is wanted.
pub(crate) fn control(args: &StreamArgs, session: &Session) -> Outcome<Option<ControlSocket>> {
    args.copy.control.as_ref().map(|path| ControlSocket::bind(path, handler(session))).transpose()
}

/// Whoever reads the JSON learns of failures before the stream began as well.
fn tell_failure(failure: &Failure, args: &StreamArgs, display: &Display) {
    if args.json {
        let state = "concluded".to_owned();
        let error = failure.message.clone();
        display.finish(Status { state, result: Some("failed"), error, ..Status::default() });
    }
}

/// Lets the clients go and closes the disk. Requests that wait for a source that doesn't answer can take long, and so a second interruption
/// ends it at once: nothing that was flushed is lost by that.
async fn close(
    session: Session,
    args: &StreamArgs,
    display: &Display,
    interrupts: &mut Interrupts,
) -> Outcome {
    let mut closing = Box::pin(session.close());
    tokio::select! {
        closed = &mut closing => return closed,
        () = tokio::time::sleep(PATIENCE) => {
            display.say("waiting for requests of clients that are still at work; interrupt again to end at once");
        }
        () = interrupts.next() => return Err(not_closed(args)),
    }
    tokio::select! {
        closed = closing => closed,
        () = interrupts.next() => Err(not_closed(args)),
    }
}

/// How long clients' last requests may take before we say what we wait for.
const PATIENCE: Duration = Duration::from_secs(2);

fn not_closed(args: &StreamArgs) -> Failure {
    let disk = args.disk.display();
    let message =
        format!("{disk}: interrupted again, so it was not closed in order; it is consistent all the same");
    Failure { code: code::INTERRUPTED, ..Failure::new(message) }
}

/// What the disk is now.
pub(crate) fn done(args: &StreamArgs) -> String {
    let disk = args.disk.display();
    match &args.base {
        None => format!("everything has been copied; {disk} stands alone"),
        Some(base) => format!("everything above {base} has been copied; {disk} stands on that"),
    }
}

/// Carries out what comes through the control socket.
fn handler(session: &Session) -> Handler {
    let (job, kept, watch) = (session.job(), session.kept(), session.watch());
    Rc::new(move |command| {
        let (job, kept, watch) = (job.clone(), kept.clone(), watch.clone());
        Box::pin(async move {
            if command == Command::Status {
                return serde_json::to_string(&watch.status()).map_err(|err| err.to_string());
            }
            let job = job.ok_or("everything has been copied, so there is nothing to command")?;
            let done = match command {
                Command::Rate(rate) => job.set_speed(rate),
                Command::GuestLatency(goal) => job.set_guest_latency(goal),
                Command::Pause => {
                    let paused = job.pause();
                    if paused.is_ok() {
                        job.wait_for(|status| status != JobStatus::Running).await;
                    }
                    paused
                }
                Command::Resume => job.resume(),
                Command::Status => Ok(()),
                Command::Cancel => {
                    let outcome = job.cancel().await.map_err(|err| err.to_string())?;
                    return match outcome {
                        headwater_job::Outcome::Completed => Ok("completed".to_owned()),
                        headwater_job::Outcome::Cancelled => Ok("cancelled".to_owned()),
                        headwater_job::Outcome::Failed(err) => Err(err.to_string()),
                    };
                }
            };
            done.map_err(|err| err.to_string())?;
            if let Some(kept) = kept {
                let written = match command {
                    Command::Rate(rate) => kept.update(|record| record.speed = rate).await,
                    Command::Pause => kept.update(|record| record.paused = true).await,
                    Command::Resume => kept.update(|record| record.paused = false).await,
                    Command::GuestLatency(_) | Command::Status | Command::Cancel => Ok(()),
                };
                written.map_err(|err| format!("it is done, but another run will not know: {err}"))?;
            }
            Ok(String::new())
        })
    })
}
