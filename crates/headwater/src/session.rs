//! A disk that is being streamed into: the overlay with its chain, the addresses where it is served, and the job.

use crate::boot_trace::{self, Recording};
use crate::cli::OnOff;
use crate::cli::stream::{OnErrorArg, StreamArgs};
use crate::display::Display;
use crate::durable::kept::Kept;
use crate::durable::streamed;
use crate::exports::Exports;
use crate::failure::Outcome;
use crate::kept_sources::KeptSources;
use crate::mirrors::Mirrors;
use crate::opener::Opener;
use crate::overlay::{self, Overlay};
use crate::progress::Status;
use crate::receipt::Receipt;
use crate::room::{self, Forecast};
use crate::runtime::Interrupts;
use crate::shell;
use headwater_block::{Clock, DetectZeroes, Disk, DiskOptions, Error, TokioClock};
use headwater_job::{Action, Event, JobHandle, OnError, StreamOptions};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// How a stream ended.
#[derive(Debug)]
pub enum Ending {
    /// Everything is local, durably, and the source may go.
    Completed,
    /// It was told to, through the control socket.
    Cancelled,
    /// It was told to, by a signal.
    Interrupted,
    /// It couldn't go on.
    Failed(Error),
}

impl Ending {
    /// The word for it in JSON.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
            Self::Failed(_) => "failed",
        }
    }
}

type JobFuture = Pin<Box<dyn Future<Output = headwater_job::Outcome>>>;

/// A job that has been made and works while its future is polled.
struct Job {
    handle: JobHandle,
    work: Option<JobFuture>,
}

/// See the module.
pub struct Session {
    disk: Rc<Disk>,
    exports: Exports,
    /// None if there is nothing to do any more.
    job: Option<Job>,
    /// What another run will know of it.
    kept: Option<Rc<Kept>>,
    kept_sources: Option<Rc<KeptSources>>,
    recording: Option<Recording>,
    forecast: Forecast,
    mirrors: Option<Rc<Mirrors>>,
    /// What is verified, and whether it was from the disk's beginning.
    verified: Option<bool>,
    clock: TokioClock,
    begun: Duration,
    /// What to do when the job has paused by itself.
    go_on: String,
}

/// How many errors are told of one by one.
const MOST_ERRORS_TOLD: u32 = 20;

impl Session {
    /// Opens the disk, which is made if it isn't there, and serves it: clients can connect when this returns. Nothing has been
    /// streamed yet.
    ///
    /// # Errors
    /// If source or disk can't be opened, don't belong together, or the addresses can't be had.
    pub async fn open(args: &StreamArgs, display: &Display) -> Outcome<Self> {
        let retry = args.copy.reach.retry(&[args.copy.reach.hold, args.copy.wait]);
        let boot_trace = args.copy.boot_trace.as_deref().map(boot_trace::load).transpose()?;
        let mirrors = Mirrors::new(&args.source, &args.copy.mirrors)?;
        let opener = Opener::new(&args.copy.open)?
            .with_retry(retry, args.copy.reach.timeout())
            .with_cache_dir(args.copy.cache_dir.as_deref(), args.copy.cache_size)?
            .with_mirrors(mirrors.clone())
            .with_read_ahead(overlay::read_ahead(args));
        let overlay = overlay::open(args, &opener, display).await?;
        let streamed = streamed::remember(args, &overlay, mirrors.as_deref(), display).await?;
        let Overlay { top, base, complete, .. } = overlay;
        let clock = TokioClock::new();
        let detect_zeroes = match args.detect_zeroes {
            Some(OnOff::On) => DetectZeroes::Unmap,
            Some(OnOff::Off) | None => DetectZeroes::Off,
        };
        let options = DiskOptions { detect_zeroes, patience: args.copy.reach.hold, ..DiskOptions::default() };
        let disk = Disk::new(top, Rc::new(clock.clone()), options);
        let record = args.copy.record_boot_trace.as_deref();
        let recording = record.map(|path| Recording::start(path, &disk)).transpose()?;
        let exports = Exports::start(&args.serve, &disk, true).await?;
        for address in exports.addresses() {
            display.say(&format!("serving {} at {address}", disk.name()));
        }
        let space = room::space_for(&args.disk, args.copy.low_water, !args.serve.is_empty())?;
        let forecast = Forecast::new(space.clone());
        let job = (!complete).then(|| {
            let options = StreamOptions {
                base,
                speed: streamed.speed,
                boot_trace,
                space,
                on_error: on_error(args.on_error),
                guest_latency: args.copy.guest_latency,
                patience: args.copy.wait,
                detect_zeroes: args.detect_zeroes != Some(OnOff::Off),
                ..StreamOptions::default()
            };
            let (handle, work) = headwater_job::stream(disk.clone(), options);
            if streamed.paused {
                // A job that hasn't begun can always be paused.
                let _ = handle.pause();
            }
            Job { handle, work: Some(Box::pin(work)) }
        });
        let begun = clock.now();
        let go_on = match &args.copy.control {
            Some(path) => format!(
                "go on with: {}",
                shell::line(["headwater", "ctl", &path.to_string_lossy(), "resume"])
            ),
            None => {
                "interrupt it, and start it again to go on (--control PATH would take a command to resume)"
                    .to_owned()
            }
        };
        if streamed.paused {
            display.say(&format!("it is paused, as it was when it ended; {go_on}"));
        }
        Ok(Self {
            disk,
            exports,
            job,
            kept: streamed.kept,
            kept_sources: opener.kept_sources(),
            recording,
            forecast,
            mirrors,
            verified: streamed.verified,
            clock,
            begun,
            go_on,
        })
    }

    /// The disk.
    pub fn disk(&self) -> &Rc<Disk> {
        &self.disk
    }

    /// True if clients are served.
    pub fn is_serving(&self) -> bool {
        !self.exports.is_empty()
    }

    /// The job's handle, if there is anything to do.
    pub fn job(&self) -> Option<JobHandle> {
        self.job.as_ref().map(|job| job.handle.clone())
    }

    /// What is written down about it, as long as there is something to do.
    pub fn kept(&self) -> Option<Rc<Kept>> {
        self.kept.clone()
    }

    /// Something that says how far it is at any time, and that outlives the session.
    pub fn watch(&self) -> Watch {
        Watch {
            disk: self.disk.clone(),
            job: self.job(),
            mirrors: self.mirrors.clone(),
            clock: self.clock.clone(),
            begun: self.begun,
        }
    }

    /// Streams to the end, whichever it is.
    pub async fn stream(&mut self, display: &Display, interrupts: &mut Interrupts) -> Ending {
        let watch = self.watch();
        let Some(job) = &mut self.job else {
            return Ending::Completed;
        };
        let Some(mut work) = job.work.take() else {
            return Ending::Completed;
        };
        let mut ticker = tokio::time::interval(display.interval());
        let mut interrupted = false;
        let mut told = 0;
        let outcome = loop {
            tokio::select! {
                biased;
                () = interrupts.next(), if !interrupted => {
                    interrupted = true;
                    // A job that is over by now has lost nothing; its outcome says which came first.
                    let _ = job.handle.request_cancel();
                }
                outcome = &mut work => break outcome,
                _ = ticker.tick() => {
                    let elapsed = self.clock.now().saturating_sub(self.begun);
                    self.forecast.tell(&job.handle.progress(), elapsed, display);
                    tell_errors(&job.handle, display, &self.go_on, &mut told);
                    tell_of_mirrors(self.mirrors.as_deref(), display);
                    display.show(watch.status());
                }
            }
        };
        tell_errors(&job.handle, display, &self.go_on, &mut told);
        let ending = match outcome {
            headwater_job::Outcome::Completed => Ending::Completed,
            headwater_job::Outcome::Cancelled if interrupted => Ending::Interrupted,
            headwater_job::Outcome::Cancelled => Ending::Cancelled,
            headwater_job::Outcome::Failed(err) => Ending::Failed(err),
        };
        let error = match &ending {
            Ending::Failed(err) => Some(err.to_string()),
            _ => None,
        };
        if let (Ending::Completed, Some(kept)) = (&ending, &self.kept)
            && let Err(err) = kept.forget().await
        {
            display.say(&format!("{err}; it is of no use any more"));
        }
        tell_of_mirrors(self.mirrors.as_deref(), display);
        let receipt = match (&ending, &self.mirrors, self.verified) {
            (Ending::Completed, Some(mirrors), Some(whole)) => Receipt::of(mirrors, self.disk.name(), whole),
            _ => None,
        };
        let text = receipt.as_ref().map(Receipt::to_string);
        display.finish(Status { result: Some(ending.word()), error, receipt, ..watch.status() });
        if let Some(text) = text {
            display.say(&text);
        }
        ending
    }

    /// Lets the clients go, flushes, and gives up the image.
    ///
    /// # Errors
    /// Those of the storage: then the last writes that no client flushed may be lost, the image is sound all the same.
    pub async fn close(self) -> Outcome {
        self.exports.stop().await;
        let closed = self.disk.close().await;
        if let Some(kept) = &self.kept_sources {
            kept.settle().await;
        }
        let recorded = match self.recording {
            Some(recording) => recording.finish().await,
            None => Ok(()),
        };
        closed?;
        recorded
    }
}

/// Tells which sources were left and returned to since the last time.
fn tell_of_mirrors(mirrors: Option<&Mirrors>, display: &Display) {
    for line in mirrors.map(Mirrors::news).unwrap_or_default() {
        display.say(&line);
    }
}

/// Tells what went wrong since the last time, and what is done about it.
fn tell_errors(job: &JobHandle, display: &Display, go_on: &str, told: &mut u32) {
    while let Some(event) = job.try_event() {
        let (error, action) = match event {
            Event::Error { error, action, .. } => (error, action),
            Event::Waits(wait) => {
                display.say(&format!(
                    "copying waits for the {}, and goes on by itself: {}",
                    wait.what, wait.error
                ));
                continue;
            }
            Event::GoesOn(_) => {
                display.say("copying goes on");
                continue;
            }
            Event::Status(_) => continue,
        };
        match action {
            // The job's end tells of it.
            Action::Report => {}
            Action::Stop => display.say(&format!("paused, because of this: {error}; {go_on}")),
            Action::Ignore => {
                *told += 1;
                match *told {
                    ..MOST_ERRORS_TOLD => {
                        display.say(&format!("{error}; this part will be tried again at the end"))
                    }
                    MOST_ERRORS_TOLD => display.say("more parts fail; they are not told of one by one"),
                    _ => {}
                }
            }
        }
    }
}

fn on_error(arg: OnErrorArg) -> OnError {
    match arg {
        OnErrorArg::Report => OnError::Report,
        OnErrorArg::Ignore => OnError::Ignore,
        OnErrorArg::Stop => OnError::Stop,
        OnErrorArg::Enospc => OnError::Enospc,
    }
}

/// Says how far a stream is.
#[derive(Clone)]
pub struct Watch {
    disk: Rc<Disk>,
    job: Option<JobHandle>,
    mirrors: Option<Rc<Mirrors>>,
    clock: TokioClock,
    begun: Duration,
}

impl Watch {
    /// How far it is now.
    pub fn status(&self) -> Status {
        let stats = self.disk.stats();
        let mut status = Status {
            guest_source_reads: stats.backing_reads.get(),
            guest_reads: stats.reads.get(),
            guest_writes: stats.writes.get() + stats.zeroes_and_discards.get(),
            held: stats.held.get(),
            held_in_all: stats.held_in_all.get(),
            longest_hold_seconds: stats.longest_hold.get().as_secs_f64(),
            retries: stats.retries.get(),
            outages: self.disk.outage().outages(),
            elapsed_seconds: (self.clock.now() - self.begun).as_secs_f64(),
            mirrors: self.mirrors.as_ref().and_then(|mirrors| mirrors.status()),
            ..Status::default()
        };
        let Some(job) = &self.job else {
            return Status { state: "completed".into(), total_is_exact: true, ..status };
        };
        let progress = job.progress();
        status.state = match job.outcome() {
            Some(headwater_job::Outcome::Completed) => "completed".to_owned(),
            Some(headwater_job::Outcome::Cancelled) => "cancelled".to_owned(),
            Some(headwater_job::Outcome::Failed(_)) => "failed".to_owned(),
            None => job.status().to_string(),
        };
        status.copied = progress.done;
        status.total = progress.total;
        status.total_is_exact = progress.total_is_exact;
        status.remaining = progress.total.saturating_sub(progress.done);
        status.space_needed = Some(progress.needs);
        status.space_free = progress.free;
        status.zeroes = progress.zeroes;
        status.rate = progress.rate;
        status.rate_limit = job.speed();
        status.eta_seconds = progress.eta.map(|eta| eta.as_secs_f64());
        status.waits_for = job.waits_for().map(|wait| wait.what.to_string());
        status.waiting_for = job.trouble().map(|err| err.to_string());
        status
    }
}
