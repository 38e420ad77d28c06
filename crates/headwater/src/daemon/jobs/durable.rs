//! Jobs that go on when the daemon is started again: `--state-dir`.
//!
//! A job is recorded before the command that starts it is answered, and what is asked of it before that is answered. Its record goes when the job
//! ends, after its result is durable, or when a user cancels it; a job that ends with the daemon keeps it, and so does one that failed because what it
//! reads has changed.
//!
//! The next daemon reads the records before anything else, and waits for the operator to make the nodes that they name: by `--blockdev`, or by
//! `blockdev-add`. When they are there, what they are is compared with what was recorded:
//!
//! - The image that is written is another one: not this record's disk. The job doesn't go on, and the file is left for the operator.
//! - Its backing link is what the job would have made of it: the job was complete when the daemon died. The record goes.
//! - What the job reads has changed: neither is the disk served, as what was copied and what is read now don't belong together. The node is not made.
//! - All is as it was: the job starts again, by the same way as from a command; with the options of the command line, when all of them are done.
//!
//! Stream and the commit of intermediate layers are kept. Commit of the active layer and mirror are not: they end with another node in the disk's place, which
//! the command line of the next daemon would have to know.

use super::{Job, JobArgs, Jobs, commit, stream};
use crate::cli::reach::show_patience;
use crate::daemon::commands::Turn;
use crate::daemon::failure::{Refusal, generic, of_error};
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::{Graph, GraphNode, Role};
use crate::durable::kept::Kept;
use crate::durable::record::{LinkChange, Record};
use crate::durable::state_dir::{Sharing, StateDir};
use crate::durable::storage::Storage;
use headwater_block::{Error, ErrorKind};
use headwater_job::Outcome;
use headwater_qmp::schema;
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// How the files with records end.
const EXTENSION: &str = ".job";

/// The commands that start a job which goes on.
const COMMANDS: [&str; 2] = ["block-stream", "block-commit"];

/// The records that there are, and where new ones are made.
pub(in crate::daemon) struct Durable {
    dir: Arc<StateDir>,
    /// Jobs whose nodes are not there yet.
    waiting: RefCell<Vec<Rc<Kept>>>,
    /// Jobs that can start.
    ready: RefCell<Vec<Rc<Kept>>>,
}

/// What a job that is to be recorded works on.
pub(super) struct Work {
    /// The image whose backing link changes in the end.
    pub(super) over: Rc<GraphNode>,
    /// The images that are only read, the top first: those right below `over`.
    pub(super) layers: Vec<Rc<GraphNode>>,
    /// Another image that is written.
    pub(super) target: Option<Rc<GraphNode>>,
    /// What `over` will call its backing in the end.
    pub(super) becomes: Option<String>,
    /// The text of a boot trace that says what is copied first.
    pub(super) boot_trace: Option<String>,
}

/// What became of the storage that a record speaks of.
enum Found {
    /// It is as it was.
    Same,
    /// The job had done its work.
    Complete,
    /// It is something else, and why.
    Other(String),
    /// What is read is not what it was: its name, and the difference.
    Changed(String, String),
}

impl Durable {
    /// Opens the directory and reads what is there. What is no use is told of, and left as it is.
    ///
    /// # Errors
    /// If the directory can't be used.
    pub(in crate::daemon) fn open(path: &str) -> headwater_block::Result<Rc<Self>> {
        let dir = Arc::new(StateDir::open(Path::new(path), Sharing::Alone)?);
        let mut waiting = Vec::new();
        for name in dir.names(EXTENSION)? {
            match read(&dir, &name) {
                Ok(record) => waiting.push(Kept::found(&dir, name, record)),
                Err(err) => tracing::error!(
                    "a job doesn't go on: {err}; remove the file if the job isn't wanted any more"
                ),
            }
        }
        Ok(Rc::new(Self { dir, waiting: RefCell::new(waiting), ready: RefCell::default() }))
    }

    /// Records a job that is about to start.
    ///
    /// # Errors
    /// If what it reads can't be looked at, its id has a record, or the record can't be written.
    async fn keep(
        &self,
        command: &str,
        args: &Options,
        job: &JobArgs,
        work: &Work,
    ) -> Result<Rc<Kept>, Refusal> {
        let was = header_link(&work.over);
        let mut read = Vec::new();
        for layer in &work.layers {
            let image = layer.inside.borrow().image.clone();
            // What the image holds back in memory would change its file later.
            if let Some(image) = image.filter(|_| !layer.is_read_only()) {
                image.finish().await.map_err(|err| of_error(&err))?;
            }
            for leaf in leaves(layer) {
                let file = leaf.inside.borrow().file.clone();
                if let Some(file) = file.filter(|_| !leaf.is_read_only()) {
                    file.sync_times().map_err(|err| of_error(&err))?;
                }
                read.push(constant(&leaf).await.map_err(|err| of_error(&err))?);
            }
        }
        let written = written(&work.over, work.target.as_ref()).map_err(|err| of_error(&err))?;
        let record = Record {
            command: command.to_owned(),
            id: job.id.clone(),
            arguments: args.clone(),
            speed: job.speed,
            paused: false,
            weight: None,
            hold: None,
            boot_trace: work.boot_trace.clone(),
            link: LinkChange { was, becomes: work.becomes.clone() },
            written,
            read,
        };
        let name = format!("{}{EXTENSION}", job.id);
        let shown = self.dir.shown(&name);
        Kept::create(&self.dir, name, record).await.map_err(|err| match err.kind() {
            ErrorKind::AlreadyExists => generic(format!(
                "Job ID '{}' is that of a job that is recorded in {shown} and isn't running; remove the file if it isn't wanted any more",
                job.id
            )),
            _ => of_error(&err),
        })
    }

    /// Looks which jobs can start now that a node was made.
    ///
    /// # Errors
    /// If one of them read something that has changed since: then the new node is no disk that anybody should see.
    pub(in crate::daemon) async fn verify(&self, graph: &Graph) -> Result<(), Refusal> {
        let waiting = self.waiting.take();
        let mut refused = Ok(());
        for kept in waiting {
            let record = kept.record();
            let Some(device) = graph.find(record.arguments.text("device").unwrap_or_default()) else {
                self.waiting.borrow_mut().push(kept);
                continue;
            };
            let shown = kept.shown();
            match found(&device, &record).await {
                Ok(Found::Same) => self.ready.borrow_mut().push(kept),
                Ok(Found::Complete) => {
                    tracing::info!("job '{}' had done its work, so its record {shown} goes", record.id);
                    forget(&kept).await;
                }
                Ok(Found::Other(why)) => tracing::error!(
                    "job '{}' doesn't go on: {shown} speaks of another disk than node '{}': {why}; remove the file if the job isn't wanted any more",
                    record.id,
                    device.name
                ),
                Ok(Found::Changed(name, why)) => {
                    refused = Err(generic(format!(
                        "{name} has changed since job '{}' was recorded in {shown}: {why}. What was copied from it and what it holds now don't belong \
                         together, so node '{}' is not opened. Bring back what {name} was; if it is known to hold the same bytes all the same, \
                         remove {shown} and start the job again",
                        record.id, device.name
                    )));
                    self.waiting.borrow_mut().push(kept);
                }
                Err(err) => {
                    let what = format!("cannot compare the disk with what is recorded in {shown}");
                    refused = Err(of_error(&err.context(what)));
                    self.waiting.borrow_mut().push(kept);
                }
            }
        }
        refused
    }

    /// Starts the jobs that can start. The caller has the turn.
    pub(in crate::daemon) async fn resume(&self, graph: &Rc<Graph>, jobs: &Rc<Jobs>, turn: &Rc<Turn>) {
        let ready = self.ready.take();
        for kept in ready {
            let record = kept.record();
            let mut args = record.arguments;
            args.insert("speed".into(), record.speed.into());
            let shown = kept.shown();
            let started = match record.command.as_str() {
                "block-commit" => commit::start(graph, jobs, turn, &args, Some(kept)).await,
                _ => stream::start(graph, jobs, turn, &args, Some(kept)).await,
            };
            match started {
                Ok(()) => tracing::info!("job '{}' goes on as recorded in {shown}", record.id),
                Err(refusal) => tracing::error!(
                    "job '{}' can't go on as recorded in {shown}: {}; the file is left, remove it if the job isn't wanted any more",
                    record.id,
                    refusal.desc
                ),
            }
        }
    }

    /// Tells of the jobs that still wait for their nodes.
    pub(in crate::daemon) fn tell_waiting(&self) {
        for kept in self.waiting.borrow().iter() {
            let record = kept.record();
            let device = record.arguments.text("device").unwrap_or_default();
            tracing::warn!(
                "job '{}' is recorded in {} and goes on when there is a node '{device}'",
                record.id,
                kept.shown()
            );
        }
    }
}

impl Jobs {
    /// Records a job that is about to start, if jobs are recorded at all.
    ///
    /// # Errors
    /// If that isn't possible: then it must not start.
    pub(super) async fn keep(
        &self,
        command: &str,
        args: &Options,
        job: &JobArgs,
        work: &Work,
    ) -> Result<Option<Rc<Kept>>, Refusal> {
        match &self.durable {
            Some(durable) => durable.keep(command, args, job, work).await.map(Some),
            None => Ok(None),
        }
    }
}

impl Job {
    /// Records that a user asked for `verb`, and got it.
    ///
    /// # Errors
    /// If that can't be written: it is so now, and another daemon would not know.
    pub(in crate::daemon) async fn write_down(&self, verb: &str) -> Result<(), Refusal> {
        let Some(kept) = &self.kept else { return Ok(()) };
        let written = match verb {
            "set-speed" => kept.update(|record| record.speed = self.handle.speed()).await,
            "set-hold" => {
                let hold = show_patience(self.handle.patience());
                kept.update(|record| record.hold = Some(hold)).await
            }
            "set-weight" => kept.update(|record| record.weight = self.handle.weight()).await,
            "pause" => kept.update(|record| record.paused = true).await,
            "resume" => kept.update(|record| record.paused = false).await,
            "cancel" => kept.forget().await,
            _ => Ok(()),
        };
        written.map_err(|err| generic(format!("it is done, but would not outlive the daemon: {err}")))
    }

    /// The job is over, and its result durable.
    pub(super) async fn end_record(&self) {
        let Some(kept) = &self.kept else { return };
        let stays = match self.handle.outcome() {
            Some(Outcome::Completed) => false,
            // The next daemon must not open the disk over the source that it has now.
            Some(Outcome::Failed(err)) if err.kind() == ErrorKind::SourceChanged => true,
            _ => self.interrupted.get(),
        };
        if !stays {
            forget(kept).await;
        }
    }
}

async fn forget(kept: &Kept) {
    if let Err(err) = kept.forget().await {
        tracing::error!("{err}; remove it, or the job it speaks of may start again");
    }
}

/// Reads a record and checks what can be checked without its nodes.
fn read(dir: &StateDir, name: &str) -> headwater_block::Result<Record> {
    let shown = dir.shown(name);
    let bytes = dir.read(name)?.unwrap_or_default();
    let record = Record::decode(&bytes, &shown)?;
    let refuse = |why: String| Err(Error::new(ErrorKind::Corrupt, format!("{shown}: {why}")));
    if !COMMANDS.contains(&record.command.as_str()) {
        return refuse(format!("a job of '{}' is not one that the daemon started", record.command));
    }
    let named = record.arguments.text("job-id") == Some(&record.id)
        && name.strip_suffix(EXTENSION) == Some(&record.id);
    if !named {
        return refuse(format!(
            "it is for a job called '{}'; its file was renamed, or belongs elsewhere",
            record.id
        ));
    }
    match schema::check_command(&record.command, record.arguments.clone()) {
        Ok(arguments) => Ok(Record { arguments, ..record }),
        Err(err) => refuse(format!("its arguments are wrong ({})", err.desc)),
    }
}

/// Compares what is there with what was recorded.
async fn found(device: &Rc<GraphNode>, record: &Record) -> headwater_block::Result<Found> {
    let mut other = None;
    let mut over = None;
    for node in images(device) {
        other = is_other(&node, record)?;
        if other.is_none() {
            over = Some(node);
            break;
        }
    }
    let Some(over) = over else {
        return Ok(Found::Other(other.unwrap_or_else(|| "there is no image".into())));
    };
    let LinkChange { was, becomes } = &record.link;
    let is = header_link(&over);
    if is != *was {
        if is == *becomes {
            return Ok(Found::Complete);
        }
        let show =
            |link: &Option<String>| link.as_ref().map_or("none".to_owned(), |name| format!("'{name}'"));
        let (was, becomes, is) = (show(was), show(becomes), show(&is));
        return Ok(Found::Other(format!("its backing link was {was}, was to become {becomes}, and is {is}")));
    }
    let below = images(&over).skip(1).flat_map(|node| leaves(&node));
    let mut below = below.collect::<Vec<_>>().into_iter();
    for then in &record.read {
        let Some(leaf) = below.next() else {
            return Ok(Found::Changed(then.name.clone(), "it is not in the chain any more".into()));
        };
        if let Some(difference) = then.difference(&constant(&leaf).await?) {
            return Ok(Found::Changed(leaf.filename(), difference));
        }
    }
    // What is written besides the image itself lies below what is read.
    for then in record.written.iter().skip(leaves(&over).len()) {
        let difference = match below.next() {
            Some(leaf) => then.is_other(&changing(&leaf)?).map(|why| format!("{}: {why}", leaf.filename())),
            None => Some(format!("{} is not in the chain any more", then.name)),
        };
        if let Some(why) = difference {
            return Ok(Found::Other(why));
        }
    }
    Ok(Found::Same)
}

/// What shows that `node` isn't the image whose link the record is about.
fn is_other(node: &Rc<GraphNode>, record: &Record) -> headwater_block::Result<Option<String>> {
    for (then, now) in record.written.iter().zip(written(node, None)?) {
        if let Some(difference) = then.is_other(&now) {
            return Ok(Some(format!("{}: {difference}", now.name)));
        }
    }
    Ok(None)
}

/// The images of the chain under `top`, without filters.
fn images(top: &Rc<GraphNode>) -> impl Iterator<Item = Rc<GraphNode>> {
    top.chain().filter(|node| !node.is_filter())
}

/// The nodes that reach the bytes of one image, its backing aside.
fn leaves(node: &Rc<GraphNode>) -> Vec<Rc<GraphNode>> {
    let own = |role| matches!(role, Role::File | Role::DataFile | Role::Filtered | Role::Compared);
    let below: Vec<_> =
        node.links.borrow().iter().filter(|link| own(link.role)).map(|link| link.to.clone()).collect();
    if below.is_empty() { vec![node.clone()] } else { below.iter().flat_map(leaves).collect() }
}

async fn constant(leaf: &Rc<GraphNode>) -> headwater_block::Result<Storage> {
    Storage::constant(&leaf.filename(), &*leaf.top()).await
}

/// The storage of the image at `over`, and then that of `target`.
fn written(over: &Rc<GraphNode>, target: Option<&Rc<GraphNode>>) -> headwater_block::Result<Vec<Storage>> {
    let leaves = leaves(over).into_iter().chain(target.into_iter().flat_map(leaves));
    leaves.map(|leaf| changing(&leaf)).collect()
}

fn changing(leaf: &Rc<GraphNode>) -> headwater_block::Result<Storage> {
    Storage::changing(&leaf.filename(), &*leaf.top())
}

/// What the header of `node` calls its backing.
fn header_link(node: &GraphNode) -> Option<String> {
    node.inside.borrow().image.as_ref().and_then(|image| image.header().backing_name)
}
