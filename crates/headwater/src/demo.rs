//! The demonstration: the main job on a source that is made for it, with clients that know what every byte must be.
//!
//! - [`model`]: what the source holds, and what the disk must hold after any number of writes.
//! - [`far`]: the source behind headwater's NBD server and a [`delay`], on a thread of its own.
//! - [`guest`]: clients, on their own threads and sockets ([`client`]), that read, write, zero and discard at random and check each answer.
//!
//! The stream itself is the one that `headwater stream` runs, with its command line.

pub mod client;
pub mod delay;
pub mod far;
pub mod guest;
pub mod model;

use crate::cli::demo::DemoArgs;
use crate::cli::{Cli, OpenArgs, Verb};
use crate::display::Display;
use crate::failure::{Failure, Outcome, code};
use crate::opener::{Access, Opener};
use crate::runtime::{self, Interrupts};
use crate::session::{Ending, Session};
use crate::shell;
use crate::size::human;
use clap::Parser;
use client::Client;
use far::Far;
use guest::{Guest, Tally};
use headwater_block::{BufferMut, Clock, Node, TokioClock};
use headwater_image::qcow2::check::Repair;
use headwater_nbd::{NbdAddress, NbdUri};
use model::{Model, Source};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How many clients work at once.
const GUESTS: u64 = 3;

/// How long the clients go on when everything has been streamed, to meet the moment in which the source is let go.
const AFTERWARDS: Duration = Duration::from_millis(300);

/// What a copy that makes one request at a time asks for at once, in bytes (QEMU's block-stream does).
const ONE_AT_A_TIME: usize = 512 << 10;

/// How many of those are timed.
const SAMPLES: u64 = 8;

/// Runs the demonstration.
///
/// # Errors
/// The first thing that isn't as it must be.
pub fn run(args: DemoArgs) -> Outcome {
    if args.size < 1 << 20 {
        return Err(Failure::usage("--size: the source must have at least 1M"));
    }
    let directory = tempfile::Builder::new()
        .prefix("headwater-demo-")
        .tempdir()
        .map_err(|err| Failure::new(format!("cannot make a temporary directory: {err}")))?;
    let result = runtime::run(demonstrate(args, directory.path()));
    directory.close().map_err(|err| Failure::new(format!("cannot remove what was made: {err}")))?;
    let proof = result?;
    crate::output::print(format!("{proof}everything that was made has been removed\n").as_bytes())
}

/// Where things are.
struct Places {
    source: PathBuf,
    source_uri: NbdUri,
    disk: PathBuf,
    disk_uri: NbdUri,
}

impl Places {
    fn within(directory: &Path) -> Self {
        let uri = |export: &str| {
            NbdUri::new(NbdAddress::Unix { path: directory.join(format!("{export}.sock")) }, export)
        };
        let (source_uri, disk_uri) = (uri("source"), uri("disk"));
        Self {
            source: directory.join("source.raw"),
            source_uri,
            disk: directory.join("disk.qcow2"),
            disk_uri,
        }
    }
}

async fn demonstrate(args: DemoArgs, directory: &Path) -> Outcome<String> {
    let mut interrupts = Interrupts::catch()?;
    let display = Display::choose(false);
    let places = Places::within(directory);
    let source = Source { size: args.size, seed: args.seed };
    let latency = Duration::from_millis(args.latency);
    let data = far::make(source, &places.source)?;
    display.say(&format!(
        "a source of {} ({} of it data, the rest zeroes and holes), {} ms away over NBD",
        human(source.size),
        human(data),
        args.latency
    ));
    let far = Far::start(&places.source, &places.source_uri, latency)?;
    let one = one_at_a_time(&places.source_uri).await?;

    let words =
        ["headwater", "stream", &places.source_uri.to_string(), &places.disk.to_string_lossy(), "--serve"];
    let words = words.map(str::to_owned).into_iter().chain([places.disk_uri.to_string()]);
    display.say(&format!("$ {}", shell::line(words.clone())));
    let Ok(Cli { verb: Verb::Stream(stream_args) }) = Cli::try_parse_from(words) else {
        return Err(Failure::new("the demonstration's own command line is refused"));
    };
    let clock = TokioClock::new();
    let mut session = Session::open(&stream_args, &display).await?;
    let served_after = clock.now();
    let tally = Arc::new(Tally::default());
    let guests = Guests::start(&places.disk_uri, source, &tally);

    let begun = clock.now();
    let ending = session.stream(&display, &mut interrupts).await;
    let took = clock.now() - begun;
    if matches!(ending, Ending::Completed) {
        clock.sleep_until(clock.now() + AFTERWARDS).await;
    }
    let models = guests.stop(&tally).await;
    let source_reads = session.disk().stats().backing_reads.get();
    session.close().await?;
    match ending {
        Ending::Completed => {}
        Ending::Interrupted => return Err(Failure::silent(code::INTERRUPTED)),
        Ending::Cancelled => return Err(Failure::new("the stream was cancelled")),
        Ending::Failed(err) => return Err(err.into()),
    }
    let mut model = Model::new(source);
    for guest in models? {
        model.merge(&guest);
    }
    // The source goes first: what is read now can only come from the local image.
    far.end()?;
    std::fs::remove_file(&places.source)
        .map_err(|err| Failure::new(format!("cannot remove the source: {err}")))?;
    let stands_on = compare(&places.disk, &model).await?;
    if let Some(backing) = stands_on {
        return Err(Failure::new(format!("the disk still stands on {backing}")));
    }

    let n = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let seconds = took.as_secs_f64();
    let alone = one.as_secs_f64() * (data as f64 / ONE_AT_A_TIME as f64);
    Ok(format!(
        "\
served {} ms after the command was given, before the first byte was streamed
streamed {} of data in {seconds:.2} s, {}/s, while {GUESTS} guests used the disk ({source_reads} of their reads went to the source)
  one request of {} at a time, as measured here, needs about {alone:.1} s: {:.0} times as long
{} guest reads ({}) were right in every byte, among {} writes, {} zero-writes, {} discards and {} flushes
all {} of the disk are byte for byte what they must be; the image is sound and stands alone
",
        served_after.as_millis(),
        human(data),
        human((data as f64 / seconds) as u64),
        human(ONE_AT_A_TIME as u64),
        alone / seconds,
        n(&tally.reads),
        human(n(&tally.read_bytes)),
        n(&tally.writes),
        n(&tally.zeroes),
        n(&tally.discards),
        n(&tally.flushes),
        human(source.size),
    ))
}

/// How long one request to the source takes when the next waits for it.
async fn one_at_a_time(uri: &NbdUri) -> Outcome<Duration> {
    let uri = uri.clone();
    let clock = TokioClock::new();
    let begun = clock.now();
    let reading = tokio::task::spawn_blocking(move || -> std::io::Result<u64> {
        let mut client = Client::connect(&uri)?;
        let mut buf = vec![0; ONE_AT_A_TIME];
        let samples = SAMPLES.min(client.size() / ONE_AT_A_TIME as u64).max(1);
        let len = (client.size().min(ONE_AT_A_TIME as u64)) as usize;
        for sample in 0..samples {
            client.read(sample * ONE_AT_A_TIME as u64, &mut buf[..len])?;
        }
        Ok(samples)
    });
    let samples = reading
        .await
        .map_err(|err| Failure::new(format!("the source can't be read: {err}")))?
        .map_err(|err| Failure::new(format!("the source can't be read: {err}")))?;
    Ok((clock.now() - begun) / samples as u32)
}

/// The guests' threads.
struct Guests {
    threads: Vec<tokio::task::JoinHandle<Result<Model, String>>>,
}

impl Guests {
    fn start(uri: &NbdUri, source: Source, tally: &Arc<Tally>) -> Self {
        let threads = (0..GUESTS).map(|number| {
            let (uri, tally) = (uri.clone(), tally.clone());
            tokio::task::spawn_blocking(move || {
                let guest = Guest::connect(&uri, source, number, GUESTS, tally);
                guest.map_err(|err| format!("guest {number} can't connect: {err}"))?.run()
            })
        });
        Self { threads: threads.collect() }
    }

    /// Ends them, and gives what they know.
    async fn stop(self, tally: &Tally) -> Outcome<Vec<Model>> {
        tally.stop.store(true, Ordering::Relaxed);
        let mut models = Vec::new();
        for thread in self.threads {
            let model = thread.await.map_err(|err| Failure::new(format!("a guest failed: {err}")))?;
            models.push(model.map_err(Failure::new)?);
        }
        Ok(models)
    }
}

/// Compares all of the image at `path` with the model, checks its structure, and says what it stands on.
async fn compare(path: &Path, model: &Model) -> Outcome<Option<String>> {
    const STEP: u64 = 1 << 20;
    let opener = Opener::new(&OpenArgs::default())?;
    let top: Rc<dyn Node> = opener.open(&path.to_string_lossy(), None, Access::Read).await?;
    let size = top.size();
    let mut expected = vec![0; STEP as usize];
    let mut at = 0;
    while at < size {
        let len = STEP.min(size - at) as usize;
        let found = top.read(at, BufferMut::new(len)).await?;
        model.expect(at, &mut expected[..len]);
        guest::compare(&(at..at + len as u64), &found, &expected[..len]).map_err(Failure::new)?;
        at += len as u64;
    }
    let backing = top.backing().map(|backing| backing.name().to_owned());
    top.close().await?;
    match opener.check(path, None, Repair::None).await? {
        Some(report) if report.corruptions == 0 => Ok(backing),
        report => Err(Failure::new(format!("the disk isn't sound: {report:?}"))),
    }
}
