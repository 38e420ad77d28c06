//! The storage daemon: QEMU's `qemu-storage-daemon`, spoken by headwater. Same command line, same QMP.
//!
//! - [`options`]: the command line, in order. [`chardev`], [`mod@monitor`]: where QMP is spoken. [`commands`]: what is done about it.
//! - [`graph`]: nodes and who may do what to them; [`filters`], [`sources`], [`object_sources`]: nodes of some kinds; [`objects`]: what they refer to.
//! - [`jobs`]: stream, commit, create. [`snapshot`]: overlays that take a node's place; [`internal_snapshot`]: those inside an image; [`transaction`]. [`exports`]: the NBD server.
//! - [`own_commands`]: what QEMU has no commands for.
//! - [`sandbox`]: two processes, one of which can't open files by itself.
//! - [`events`]: what is told to all monitors. [`trace`]: what is told to people who look for faults. [`background`]: leaving the terminal.
//!
//! Everything runs on one thread, commands and data. A command may wait for I/O, and requests of clients go on meanwhile.

mod background;
mod boot_traces;
mod chardev;
mod commands;
mod events;
mod exports;
mod failure;
mod filters;
mod fleecing;
mod graph;
mod internal_snapshot;
mod jobs;
mod monitor;
mod new_image;
mod object_sources;
mod objects;
mod options;
mod own_commands;
mod qom;
mod replicas;
mod sandbox;
mod snapshot;
mod sources;
pub(crate) mod trace;
mod transaction;

use self::chardev::Chardev;
use self::commands::Commands;
use self::events::Events;
use self::failure::{Refusal, generic};
use self::graph::Graph;
use self::graph::open::{Options, Read};
use self::graph::shares::Sources;
use self::jobs::durable::Durable;
use self::objects::Objects;
pub use self::options::HELP;
use self::options::{CommandLine, Line, Setting};
use self::sandbox::Confined;
use crate::failure::{Failure, Outcome};
use crate::runtime;
use headwater_block::share::SharePool;
use headwater_image::open_gate::Trust;
use headwater_storage::cache_dir::{CACHE_SIZE, CacheDir};
use headwater_storage::file::{Engine, IoMode};
use std::ffi::OsString;
use std::rc::Rc;
use tokio::signal::unix::{SignalKind, signal};

/// The name under which the program is the daemon, whatever its arguments.
pub const PROGRAM: &str = "headwater-storage-daemon";

/// How much is kept in memory of what disks share, in bytes: two seconds of a link of 1 Gbit/s, by which streams may begin one after the other.
const SHARE_MEMORY: u64 = 256 << 20;

/// Runs the daemon on a command line without the program's name.
///
/// # Errors
/// What is wrong with the command line, or can't be had.
pub fn run(arguments: Vec<OsString>) -> Outcome {
    let line = match options::parse(&arguments)? {
        CommandLine::Run(line) => line,
        CommandLine::Print(text) => return crate::output::print(text.as_bytes()),
    };
    trace::start(&line.trace)?;
    let background = background::enter(line.daemonize, &arguments)?;
    let Some(started) = background else { return Ok(()) };
    // Before there is a broker, which lets in where the directory is.
    let durable = line.state_dir.as_deref().map(Durable::open).transpose()?;
    line.cache_dir.as_deref().map(|path| CacheDir::make(path.as_ref())).transpose()?;
    let mut confined = sandbox::enter(&line)?;
    // The broker goes when everything that asks for it has.
    runtime::run(serve(line, started, durable, &mut confined))
}

/// The daemon's life, in the process that does the work.
async fn serve(
    line: Line,
    started: background::Started,
    durable: Option<Rc<Durable>>,
    confined: &mut Confined,
) -> Outcome {
    let events = Rc::<Events>::default();
    let engine = Engine::new(IoMode::Auto)?;
    let objects = Rc::<Objects>::default();
    objects.set_trust(trust(&line.allow_backing));
    objects.set_patience(line.hold);
    let cache_size = line.cache_size.unwrap_or(CACHE_SIZE);
    let open = |path: &str| CacheDir::open(&engine, path.as_ref(), cache_size);
    let cache = line.cache_dir.as_deref().map(open).transpose()?;
    let shared = SharePool::new(line.share_memory.unwrap_or(SHARE_MEMORY));
    let graph = Graph::new(engine, objects, Sources { shared, cache });
    graph.low_water.set(line.low_water);
    let commands = Commands::new(graph, events, durable, line.job_limit);
    let mut signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
        .map(signal)
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .map_err(|err| Failure::new(format!("cannot catch signals: {err}")))?;
    let mut ended = Box::pin(std::future::poll_fn(move |cx| {
        let ready = signals.iter_mut().any(|signal| signal.poll_recv(cx).is_ready());
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    }));
    let broken = confined.broken()?;
    // From here on only what was named is opened.
    confined.lock_down()?;
    let mut chardevs = Vec::new();
    let setting_up = set_up(&commands, &mut chardevs, &line.settings, confined);
    let set_up = tokio::select! {
        biased;
        () = &mut ended => Ok(false),
        done = setting_up => done.map(|()| true),
    };
    let set_up = match (set_up, &line.pidfile) {
        (Ok(true), Some(path)) => background::PidFile::write(path).map(Some),
        (Ok(true), None) => Ok(None),
        (Ok(false), _) => {
            commands.shut_down().await;
            return Ok(());
        }
        (Err(failure), _) => Err(failure),
    };
    let pidfile = match set_up {
        Ok(pidfile) => pidfile,
        Err(failure) => {
            commands.shut_down().await;
            return Err(failure);
        }
    };
    started.tell(|| confined.detach());
    let outcome = tokio::select! {
        () = ended => Ok(()),
        () = commands.ending() => Ok(()),
        () = broken => Err(Failure::new("the process that opens files was ended by somebody else; so this one ends")),
    };
    commands.shut_down().await;
    drop(pidfile);
    chardevs.iter().for_each(|chardev| chardev.finish());
    outcome
}

/// What names inside images may lead to, beyond their own directories.
fn trust(allowed: &[String]) -> Trust {
    let mut trust = Trust::default();
    for name in allowed {
        trust.allow_source(name);
    }
    trust
}

/// Does what the command line says, in its order.
async fn set_up(
    commands: &Rc<Commands>,
    chardevs: &mut Vec<Rc<Chardev>>,
    settings: &[Setting],
    confined: &mut Confined,
) -> Outcome {
    for setting in settings {
        let done = apply(commands, chardevs, setting, confined).await;
        done.map_err(|Refusal { desc, hint, .. }| {
            Failure::new(format!("{}: {desc}", setting.shown())).with_hint(hint)
        })?;
    }
    commands.start().await;
    Ok(())
}

async fn apply(
    commands: &Rc<Commands>,
    chardevs: &mut Vec<Rc<Chardev>>,
    setting: &Setting,
    confined: &mut Confined,
) -> Result<(), Refusal> {
    match setting {
        Setting::Blockdev(options, _) => commands.add_node(options).await,
        Setting::Object(options, _) => commands.graph.objects.add(options),
        Setting::NbdServer(options, _) => commands.exports.start_server(options),
        Setting::Export(options, _) => commands.exports.add(options).await,
        Setting::Chardev(options, _) => {
            let desk = confined.next_desk().map_err(|err| generic(format!("chardev: {err}")))?;
            let chardev = Chardev::open(options, desk).await?;
            if chardev.is_stdio() && chardevs.iter().any(|other| other.is_stdio()) {
                return Err(generic("cannot use stdio by multiple character devices"));
            }
            if chardev.is_stdio() && background::is_child() {
                return Err(generic("cannot use stdio with -daemonize"));
            }
            commands.chardevs.enter(&chardev)?;
            chardevs.push(chardev);
            Ok(())
        }
        Setting::Monitor(options, _) => monitor(commands, chardevs, options),
    }
}

fn monitor(commands: &Rc<Commands>, chardevs: &[Rc<Chardev>], options: &Options) -> Result<(), Refusal> {
    let id = options.text("chardev").unwrap_or_default();
    let found = chardevs.iter().find(|chardev| chardev.id == id).cloned();
    let chardev = found.ok_or_else(|| generic(format!("chardev \"{id}\" not found")))?;
    if options.text("mode").is_some_and(|mode| mode != "control") {
        return Err(generic("Only QMP is supported"));
    }
    chardev.take()?;
    let pretty = options.flag("pretty").unwrap_or(false);
    let monitor = tokio::task::spawn_local(monitor::serve(chardev, commands.clone(), pretty));
    commands.monitors.borrow_mut().push(monitor);
    Ok(())
}
