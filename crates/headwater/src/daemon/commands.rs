//! QMP's commands: from a name and checked arguments to what is done.
//!
//! Commands that change or read the graph take their [`Turn`], one at a time and in the order in which they came, whichever monitor they came
//! from; so do jobs when they change the graph at their end. Verbs of jobs don't, because they may wait for a job that does.

use super::boot_traces::Recordings;
use super::chardev::Chardevs;
use super::events::Events;
use super::exports::Exports;
use super::failure::{Refusal, generic, of_error};
use super::graph::open::{Options, Read};
use super::graph::rights::{Doing, Rights};
use super::graph::{Graph, Role};
use super::internal_snapshot;
use super::jobs::durable::Durable;
use super::jobs::{self, Jobs, refused};
use super::qom;
use super::snapshot;
use super::transaction;
use headwater_block::range_lock::{Guard, Mode, RangeLock, Token};
use headwater_job::Status;
use headwater_qmp::message::VersionTriple;
use headwater_qmp::{Version, schema};
use serde_json::{Value, json};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Lets one at a time change the graph. In the order of arrival.
pub(super) struct Turn(Rc<RangeLock>);

impl Turn {
    /// Nobody has it.
    pub(super) fn new() -> Rc<Self> {
        Rc::new(Self(RangeLock::new()))
    }

    /// Waits for it.
    pub(super) async fn take(&self) -> Guard {
        self.0.acquire(Token::for_request(), 0..1, Mode::Exclusive).await
    }
}

/// How long a monitor may take to read the last that it is sent.
const LINGER: Duration = Duration::from_secs(2);

/// Storage that is out of reach when the daemon is told to end is waited for this long, whatever its `reconnect-delay`: a server that is being restarted is back by then.
const COMES_BACK_WITHIN: Duration = Duration::from_secs(2);

/// A job that isn't in the middle of something has obeyed before it is answered, if it obeys as quickly as this.
const OBEYS_WITHIN: Duration = Duration::from_millis(200);

/// What the daemon is up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// The command line is being carried out; commands wait for its end.
    Starting,
    Serving,
    Ending,
    Ended,
}

/// What commands work on.
pub(super) struct Commands {
    pub(super) graph: Rc<Graph>,
    pub(super) jobs: Rc<Jobs>,
    pub(super) exports: Rc<Exports>,
    events: Rc<Events>,
    pub(super) turn: Rc<Turn>,
    /// What the daemon is up to.
    life: watch::Sender<Life>,
    pub(super) monitors: RefCell<Vec<JoinHandle<()>>>,
    pub(super) chardevs: Chardevs,
    pub(super) boot_traces: Recordings,
    durable: Option<Rc<Durable>>,
}

impl Commands {
    /// Jobs are recorded where `durable` says, if anywhere, and copy at most `job_limit` bytes per second together; 0 is without limit.
    pub(super) fn new(
        graph: Rc<Graph>,
        events: Rc<Events>,
        durable: Option<Rc<Durable>>,
        job_limit: u64,
    ) -> Rc<Self> {
        let turn = Turn::new();
        Rc::new(Self {
            jobs: Jobs::new(events.clone(), turn.clone(), durable.clone(), job_limit),
            exports: Exports::new(graph.clone(), events.clone()),
            graph,
            events,
            turn,
            life: watch::Sender::new(Life::Starting),
            monitors: RefCell::default(),
            chardevs: Chardevs::default(),
            boot_traces: Recordings::default(),
            durable,
        })
    }

    pub(super) fn events(&self) -> &Rc<Events> {
        &self.events
    }

    /// Makes a node. It isn't there afterwards if a job that is recorded can't go on with it.
    ///
    /// # Errors
    /// Those of [`Graph::add`], and what a record says against it.
    pub(super) async fn add_node(&self, options: &Options) -> Result<(), Refusal> {
        let Some(name) = options.text("node-name") else {
            return Err(generic("'node-name' must be specified for the root node"));
        };
        self.graph.add(options.clone(), true).await?;
        let Some(durable) = &self.durable else { return Ok(()) };
        let verified = durable.verify(&self.graph).await;
        if verified.is_err() {
            self.graph.remove(name).await?;
        }
        verified
    }

    /// Lets the jobs go on that were recorded and whose nodes are there. The caller has the turn.
    pub(super) async fn resume_jobs(&self) {
        if let Some(durable) = &self.durable {
            durable.resume(&self.graph, &self.jobs, &self.turn).await;
        }
    }

    /// The command line has made everything: lets jobs go on, tells which ones still wait, and takes commands from now on. So whoever asks for
    /// the jobs finds those that go on.
    pub(super) async fn start(&self) {
        let _turn = self.turn.take().await;
        self.resume_jobs().await;
        if let Some(durable) = &self.durable {
            durable.tell_waiting();
        }
        self.life.send_replace(Life::Serving);
    }

    /// Completes when commands are taken.
    async fn started(&self) {
        // The sender lives as long as this does.
        let _ = self.life.subscribe().wait_for(|life| *life != Life::Starting).await;
    }

    /// The daemon was told to end.
    pub(super) fn is_quitting(&self) -> bool {
        matches!(*self.life.borrow(), Life::Ending | Life::Ended)
    }

    /// Completes when the daemon is told to end.
    pub(super) async fn ending(&self) {
        // The sender lives as long as this does.
        let _ = self.life.subscribe().wait_for(|life| matches!(life, Life::Ending | Life::Ended)).await;
    }

    /// Completes when everything has ended, and nothing is left to be told.
    pub(super) async fn ended(&self) {
        // The sender lives as long as this does.
        let _ = self.life.subscribe().wait_for(|life| *life == Life::Ended).await;
    }

    /// The version that is told: the QEMU whose language this is, and in `package` who speaks it.
    pub(super) fn version(&self) -> Version {
        let package = concat!("headwater ", env!("CARGO_PKG_VERSION")).to_owned();
        Version { qemu: VersionTriple { micro: 2, minor: 0, major: 10 }, package }
    }

    /// Ends jobs, exports and nodes in this order: everything is consistent and flushed afterwards.
    pub(super) async fn shut_down(self: &Rc<Self>) {
        self.life.send_replace(Life::Ending);
        self.wind_up().await;
        let turn = self.turn.take().await;
        self.graph.close_all().await;
        drop(turn);
        self.life.send_replace(Life::Ended);
        self.events.close();
        for monitor in self.monitors.take() {
            // A client that doesn't read what it is sent has had its time.
            let _ = tokio::time::timeout(LINGER, monitor).await;
        }
    }

    /// Ends jobs, and then exports.
    async fn wind_up(self: &Rc<Self>) {
        let graph = self.graph.clone();
        tokio::task::spawn_local(async move {
            tokio::time::sleep(COMES_BACK_WITHIN).await;
            graph.stop_waiting();
        });
        self.jobs.cancel_all().await;
        self.exports.close().await;
        self.boot_traces.end_all().await;
    }

    /// Carries a command out.
    ///
    /// # Errors
    /// Why it wasn't.
    pub(super) async fn execute(self: &Rc<Self>, name: &str, args: Options) -> Result<Value, Refusal> {
        self.started().await;
        if let Some(done) = self.job_verb(name, &args).await {
            return done.map(|()| json!({}));
        }
        if let Some(answer) = self.query(name, &args) {
            return answer;
        }
        if let Some(answer) = self.own(name, &args).await {
            return answer;
        }
        if name == "quit" {
            // What ends with the daemon is told of before the answer.
            self.wind_up().await;
            self.life.send_replace(Life::Ending);
            return Ok(json!({}));
        }
        let _turn = self.turn.take().await;
        if name == "blockdev-snapshot-delete-internal-sync" {
            return internal_snapshot::delete(&self.graph, &args).await;
        }
        let changed = self.change(name, &args).await;
        self.exports.look_at_sizes();
        changed.map(|()| json!({}))
    }

    /// Questions, which wait for nothing.
    fn query(&self, name: &str, args: &Options) -> Option<Result<Value, Refusal>> {
        Some(Ok(match name {
            "query-version" => json!(self.version()),
            "query-commands" => schema::query_commands(),
            "query-qmp-schema" => schema::introspection().clone(),
            "query-jobs" => self.jobs.query(),
            "query-block-jobs" => self.jobs.query_block_jobs(),
            "query-named-block-nodes" => self.graph.describe_nodes(args.flag("flat").unwrap_or(false)),
            "query-block-exports" => self.exports.query(),
            // Devices are what a machine has.
            "query-block" => json!([]),
            "query-blockstats" => {
                if args.flag("query-nodes").unwrap_or(false) {
                    self.graph.describe_stats()
                } else {
                    json!([])
                }
            }
            "query-chardev" => self.chardevs.describe(),
            "query-chardev-backends" => Chardevs::backends(),
            "ringbuf-read" => return Some(self.chardevs.read(args)),
            "x-debug-query-block-graph" => self.graph.describe_graph(&self.exports.nodes()),
            "qom-list" => return Some(self.graph.objects.list(args.text("path").unwrap_or_default())),
            "qom-get" => {
                let property = args.text("property").unwrap_or_default();
                return Some(self.graph.objects.get(args.text("path").unwrap_or_default(), property));
            }
            "qom-list-types" => qom::types(args),
            "qom-list-properties" => {
                return Some(qom::properties(args.text("typename").unwrap_or_default()));
            }
            _ => return None,
        }))
    }

    /// Verbs of jobs; none if the command isn't one.
    async fn job_verb(&self, name: &str, args: &Options) -> Option<Result<(), Refusal>> {
        let (family, verb) = match name.strip_prefix("block-job-") {
            Some(verb) => ("block-job", verb),
            None => ("job", name.strip_prefix("job-")?),
        };
        let id = args.text("device").or_else(|| args.text("id")).unwrap_or_default();
        let found = if family == "job" { self.jobs.find(id) } else { self.jobs.find_block_job(id) };
        let job = match found {
            Ok(job) => job,
            Err(refusal) => return Some(Err(refusal)),
        };
        tracing::trace!(target: super::trace::TARGET, event = "job_apply_verb", id, verb, state = %job.handle.status());
        let sleeps = !job.handle.is_busy();
        let mut told = job.told();
        let force = family == "job" || args.flag("force").unwrap_or(false);
        let asked = match verb {
            "pause" => job.handle.pause(),
            "resume" => job.handle.resume(),
            "cancel" if force => job.handle.request_cancel(),
            "cancel" => job.handle.request_soft_cancel(),
            "complete" => job.handle.complete(),
            "finalize" => job.handle.finalize(),
            "dismiss" => job.handle.dismiss(),
            "set-speed" => match jobs::stream::speed(args) {
                Ok(speed) => job.handle.set_speed(speed),
                Err(refusal) => return Some(Err(refusal)),
            },
            "change" => return Some(job.change(args)),
            _ => return None,
        };
        if let Err(illegal) = asked {
            return Some(Err(refused(&job, &illegal)));
        }
        if let Err(refusal) = job.write_down(verb).await {
            return Some(Err(refusal));
        }
        match verb {
            // What these bring about has happened when they are answered, so that the answer and the events agree.
            "finalize" => job.wait_for_rest().await,
            "dismiss" => job.wait_for_end_of_dismissed().await,
            "cancel" if job.handle.status() == Status::Pending => job.wait_for_rest().await,
            // A job that isn't in the middle of something obeys at once.
            "cancel" if sleeps && job.handle.status() != Status::Ready => {
                job.wait_for_end().await;
            }
            "pause" | "resume" if sleeps => {
                // If somebody else asks for the contrary at the same time there is nothing to wait for.
                let _ = tokio::time::timeout(OBEYS_WITHIN, told.changed()).await;
            }
            _ => {}
        }
        Some(Ok(()))
    }

    /// Everything that changes the graph. The caller has the turn.
    async fn change(self: &Rc<Self>, name: &str, args: &Options) -> Result<(), Refusal> {
        let text = |key: &str| args.text(key).unwrap_or_default();
        match name {
            "blockdev-add" => {
                self.add_node(args).await?;
                self.resume_jobs().await;
                Ok(())
            }
            "blockdev-del" => {
                self.graph.remove(text("node-name")).await?;
                // It is gone, whatever becomes of the file.
                self.boot_traces.end(text("node-name")).await
            }
            "blockdev-reopen" => {
                let all = args.get("options").and_then(Value::as_array).into_iter().flatten();
                self.graph.reopen(all.filter_map(Value::as_object).cloned().collect()).await
            }
            "blockdev-set-active" => self.set_active(args).await,
            "blockdev-create" => jobs::create::start(&self.graph, &self.jobs, args).await,
            "x-blockdev-amend" => jobs::amend::start(&self.graph, &self.jobs, args).await,
            "blockdev-snapshot" | "blockdev-snapshot-sync" => snapshot::single(&self.graph, name, args).await,
            "blockdev-snapshot-internal-sync" => {
                internal_snapshot::take(&self.graph, args).await.map(|_taken| ())
            }
            "transaction" => transaction::run(&self.graph, &self.jobs, args).await,
            "change-backing-file" => snapshot::change_backing_file(&self.graph, args).await,
            "block_resize" => self.resize(args).await,
            "block-stream" => jobs::stream::start(&self.graph, &self.jobs, &self.turn, args, None).await,
            "block-commit" => jobs::commit::start(&self.graph, &self.jobs, &self.turn, args, None).await,
            "blockdev-backup" => {
                let plan = jobs::backup::plan(&self.graph, &self.jobs, args, None).await?;
                self.jobs.start(plan).await;
                Ok(())
            }
            "drive-backup" => {
                let plan = jobs::drive::plan_backup(&self.graph, &self.jobs, args, None).await?;
                self.jobs.start(plan).await;
                Ok(())
            }
            "drive-mirror" => jobs::drive::start_mirror(&self.graph, &self.jobs, &self.turn, args).await,
            "blockdev-mirror" => jobs::mirror::start(&self.graph, &self.jobs, &self.turn, args).await,
            "block-set-write-threshold" => {
                let node = self.graph.node(text("node-name"))?;
                self.graph.watch_writes(&node, args.number("write-threshold").unwrap_or(0), &self.events);
                Ok(())
            }
            "block-export-add" => self.exports.add(args).await,
            "block-export-del" => self.exports.remove(text("id"), text("mode") == "hard").await,
            "nbd-server-start" => self.exports.start_server(args),
            "nbd-server-stop" => self.exports.stop_server().await,
            "nbd-server-add" => {
                let mut export = args.clone();
                let device = export.remove("device").unwrap_or_default();
                self.graph.any(device.as_str().unwrap_or_default())?;
                let id = args.get("name").cloned().unwrap_or_else(|| device.clone());
                export.insert("node-name".into(), device);
                export.insert("id".into(), id);
                export.insert("type".into(), "nbd".into());
                self.exports.add(&export).await
            }
            "nbd-server-remove" => {
                let id = self.exports.id_of(text("name"))?;
                self.exports.remove(&id, text("mode") == "hard").await
            }
            "chardev-add" => self.chardevs.add(args).await,
            "chardev-change" => self.chardevs.change(args).await,
            "chardev-remove" => self.chardevs.remove(text("id")),
            "chardev-send-break" => self.chardevs.find(text("id")),
            "ringbuf-write" => self.chardevs.write(args),
            "object-add" => self.graph.objects.add(args),
            "object-del" => self.graph.objects.remove(text("id")),
            "qom-set" => {
                let value = args.get("value").cloned().unwrap_or_default();
                self.graph.objects.set(text("path"), text("property"), &value)
            }
            "x-blockdev-set-iothread" => self.set_iothread(args),
            "x-blockdev-change" => self.change_children(args),
            _ => Err(generic(format!("The command {name} is not supported by headwater"))),
        }
    }

    /// `x-blockdev-change`: adds and removes children of drivers that have a changing number of them (quorum). None of ours has.
    fn change_children(&self, args: &Options) -> Result<(), Refusal> {
        let parent = self.graph.any(args.text("parent").unwrap_or_default())?;
        match (args.text("child"), args.text("node")) {
            (Some(_), Some(_)) => Err(generic("The parameters child and node are in conflict")),
            (None, None) => Err(generic("Either child or node must be specified")),
            (Some(child), None) if !parent.links.borrow().iter().any(|link| link.name == child) => {
                Err(generic(format!("Node '{}' does not have child '{child}'", parent.name)))
            }
            (Some(_), None) => {
                Err(generic(format!("The node {} does not support removing a child", parent.name)))
            }
            (None, Some(node)) if self.graph.node(node).is_err() => {
                Err(generic(format!("Node '{node}' not found")))
            }
            (None, Some(_)) => {
                Err(generic(format!("The node {} does not support adding a child", parent.name)))
            }
        }
    }

    /// `x-blockdev-set-iothread`: all disks are on one thread, so there is only something to check.
    fn set_iothread(&self, args: &Options) -> Result<(), Refusal> {
        let name = args.text("node-name").unwrap_or_default();
        if self.graph.find(name).is_none() {
            return Err(generic(format!("Failed to find node with node-name='{name}'")));
        }
        match args.text("iothread") {
            Some(thread) if !self.graph.objects.is_io_thread(thread) => {
                Err(generic(format!("Cannot find iothread {thread}")))
            }
            _ => Ok(()),
        }
    }

    async fn resize(&self, args: &Options) -> Result<(), Refusal> {
        let (device, name) =
            (args.text("device").unwrap_or_default(), args.text("node-name").unwrap_or_default());
        let node = self.graph.device_or_node(device, name)?;
        let size = match args.get("size").and_then(Value::as_i64) {
            Some(size) if size < 0 => return Err(generic("Parameter 'size' expects a >0 size")),
            _ => args.number("size").unwrap_or(0),
        };
        node.check_idle()?;
        self.graph.check_not_backing(&node)?;
        if node.skip_filters().driver == "qcow2" && !size.is_multiple_of(512) {
            return Err(generic("The new size must be a multiple of 512"));
        }
        let rights = Rights { does: Doing::RESIZE, bears: Doing::ALL };
        let root = self.graph.attach(&node, ("an unnamed block device", "root"), rights, false).await;
        let mut layers = std::iter::successors(Some(node.clone()), |filter| filter.child(Role::Filtered));
        let read_only = layers.any(|layer| layer.is_read_only());
        let resized = match &root {
            Ok(_) if read_only => Err(generic("Image is read-only")),
            Ok(_) => node.skip_filters().disk.resize(size).await.map_err(|err| of_error(&err)),
            Err(refusal) => Err(refusal.clone()),
        };
        drop(root);
        self.graph.collect().await;
        resized
    }

    async fn set_active(&self, args: &Options) -> Result<(), Refusal> {
        let active = args.flag("active").unwrap_or(true);
        match args.text("node-name") {
            None => self.graph.set_all_active(active).await,
            Some(name) if active => self.graph.activate(&self.graph.node(name)?).await,
            Some(name) => self.graph.inactivate(&self.graph.node(name)?).await,
        }
    }
}
