//! Carries a case out in the simulator, and keeps the record of it.

use crate::case::{Case, Step};
use crate::promise::{Kind, Promises, SECTOR, fill};
use crate::snapshots::{self, Snapshots};
use crate::world::{Workload, World, bytes_of, text};
use headwater_block::drain::Drained;
use headwater_block::node::BackingLink;
use headwater_block::{Buffer, Disk, DiskOptions, Edge, Limits, Node, WriteFlags, ZeroFlags};
use headwater_image::qcow2::header::Header;
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_job::window::Bounds;
use headwater_job::{
    Base, CommitOptions, JobHandle, Link, MirrorOptions, Outcome, StreamOptions, commit, commit_active,
    stream,
};
use headwater_sim::{History, Pages, Recorder, Sim, SimFile, SimFilter, Task};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// What the files went through, and what the guest was promised.
pub(crate) struct Run {
    pub(crate) history: History,
    pub(crate) promises: Promises,
    /// The moment at which the job ended, and whether it had completed.
    pub(crate) job_ended: Option<(usize, bool)>,
    /// From this moment on the guest used the base.
    pub(crate) pivoted: Option<usize>,
    pub(crate) snapshots: Snapshots,
}

/// How storage misbehaves, to see that it is noticed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Lies {
    /// Flushes succeed and do nothing.
    pub(crate) no_flush: bool,
}

/// Carries a case out. The error says what a guest or a job was refused.
pub(crate) fn run(case: &Case, world: &World, lies: Lies) -> Result<Run, String> {
    let sim = Sim::new(case.seed);
    sim.set_step_limit(4_000_000);
    let files = world.files.iter().map(|(name, bytes)| sim_file(&sim, name, bytes, world.alignment));
    let files: Vec<Rc<SimFile>> = files.collect();
    let recorder = Recorder::start(&files.iter().map(|file| &**file).collect::<Vec<_>>());
    let promises = Promises::new(world.salt, world.start.clone(), world.create.size);
    let guest = Guest {
        sim: sim.clone(),
        workload: world.workload,
        salt: world.salt,
        recorder: recorder.clone(),
        promises: Rc::new(promises),
        job_ended: Rc::default(),
        pivoted: Rc::default(),
        snapshots: Rc::default(),
    };
    let (steps, returned) = (case.steps.clone(), guest.clone());
    let lower = Lower::of(world, &files);
    let options = world.options();
    let here = sim.clone();
    sim.run(async move {
        let disks = open(&here, options, &files, lower).await?;
        guest.go(disks, steps).await
    })?;
    let mut history = recorder.history();
    if lies.no_flush {
        let is_flush = |event: &(usize, headwater_sim::Event)| {
            matches!(event.1, headwater_sim::Event::Started { op: headwater_sim::Op::Flush, .. })
        };
        // What nobody hears of covers nothing; moments stay what they are.
        for event in history.events.iter_mut().filter(|event| is_flush(event)) {
            event.1 = headwater_sim::Event::Ended { id: u64::MAX, ok: true };
        }
    }
    let (job_ended, pivoted) = (returned.job_ended.get(), returned.pivoted.get());
    let snapshots = returned.snapshots.take();
    let promises = Rc::into_inner(returned.promises).expect("all tasks are over");
    Ok(Run { history, promises, job_ended, pivoted, snapshots })
}

fn sim_file(sim: &Sim, name: &str, bytes: &[u8], alignment: u32) -> Rc<SimFile> {
    let mut pages = Pages::new(0, 512);
    pages.write(0, bytes);
    let file = SimFile::new(sim, name, pages);
    file.set_limits(Limits { write_alignment: alignment, ..file.limits() });
    file
}

/// What lies below the image.
enum Lower {
    /// Nodes that nobody changes; their header tells the rest.
    Still { data_file: Option<Rc<dyn Node>>, backing: Option<Rc<dyn Node>> },
    /// An image that is committed into, and whether a layer lies between.
    Base { file: Rc<SimFile>, mid: Option<Vec<u8>> },
}

impl Lower {
    fn of(world: &World, files: &[Rc<SimFile>]) -> Self {
        if matches!(world.workload, Workload::Commit | Workload::CommitActive) {
            return Lower::Base { file: files[1].clone(), mid: world.mid_bytes() };
        }
        let others: Vec<Rc<dyn Node>> = files[1..].iter().map(|file| file.clone() as Rc<dyn Node>).collect();
        let base = world.create.backing.is_some().then(|| world.base(&others).expect("there is a base"));
        let backing = match world.mid_bytes() {
            Some(_) => base.map(|base| world.mid(base).expect("there is a layer between")),
            None => base,
        };
        Lower::Still { data_file: world.create.data_file.is_some().then(|| others[0].clone()), backing }
    }
}

/// The disks of a run.
struct Disks {
    top: Rc<Disk>,
    /// The image on top.
    image: Rc<Qcow2Node>,
    /// The lowest layer, as a node of the chain.
    lowest: Option<Rc<dyn Node>>,
    /// The disk that is committed into.
    base: Option<Rc<Disk>>,
}

async fn open(
    sim: &Sim,
    options: Qcow2Options,
    files: &[Rc<SimFile>],
    lower: Lower,
) -> Result<Disks, String> {
    let (children, lowest, base) = match lower {
        Lower::Still { data_file, backing } => {
            let lowest = backing.as_ref().and_then(|backing| backing.backing()).or_else(|| backing.clone());
            (Children { data_file, backing }, lowest, None)
        }
        Lower::Base { file, mid } => {
            let node = Qcow2Node::open(file, Children::default(), options).await.map_err(text)?;
            let base = Disk::new(node, sim.clock(), DiskOptions::default());
            let filter: Rc<dyn Node> = SimFilter::new(sim, "base", base.clone());
            let below = match mid {
                None => filter.clone(),
                Some(bytes) => {
                    let mid = sim_file(sim, "mid", &bytes, 1);
                    mid.set_read_only(true);
                    let children = Children { data_file: None, backing: Some(filter.clone()) };
                    Qcow2Node::open(mid, children, Qcow2Options::default()).await.map_err(text)?
                }
            };
            (Children { data_file: None, backing: Some(below) }, Some(filter), Some(base))
        }
    };
    let node = Qcow2Node::open(files[0].clone(), children, options).await.map_err(text)?;
    let top = Disk::new(node.clone(), sim.clock(), DiskOptions::default());
    Ok(Disks { top, image: node, lowest, base })
}

type Asked = Vec<Task<Result<(), String>>>;

/// The guest, who also commands the job.
#[derive(Clone)]
struct Guest {
    sim: Sim,
    workload: Workload,
    salt: u64,
    recorder: Rc<Recorder>,
    promises: Rc<Promises>,
    job_ended: Rc<Cell<Option<(usize, bool)>>>,
    pivoted: Rc<Cell<Option<usize>>>,
    snapshots: Rc<RefCell<Snapshots>>,
}

impl Guest {
    async fn go(self, disks: Disks, steps: Vec<Step>) -> Result<(), String> {
        let edge = Edge::new(disks.top.clone());
        let mut asked: Asked = Vec::new();
        let mut job: Option<(JobHandle, Task<Outcome>)> = None;
        for step in steps {
            match step {
                Step::Settle => settle(&mut asked).await?,
                Step::Resize(sectors) => {
                    settle(&mut asked).await?;
                    self.resize(&edge, sectors * SECTOR).await?;
                }
                Step::Relink(len) => {
                    let name = format!("base{}", "x".repeat(len));
                    let format = "raw";
                    let link = BackingLink { name: &name, format };
                    match disks.top.change_backing(Some(link), disks.lowest.clone()).await {
                        // It may be too long for the first cluster.
                        Err(err) if !matches!(err.kind(), headwater_block::ErrorKind::Io) => {}
                        other => other.map_err(text)?,
                    }
                }
                Step::TakeSnapshot | Step::DeleteSnapshot(_) => {
                    settle(&mut asked).await?;
                    let now = || self.recorder.now();
                    snapshots::step(&disks.top, &disks.image, &step, &self.snapshots, now).await?;
                }
                Step::StartJob => job = Some(self.start(&disks, &edge)),
                Step::Cancel => {
                    if let Some((job, _)) = &job {
                        let _too_late = job.request_cancel();
                    }
                }
                Step::Complete => self.complete(&mut job).await?,
                other => {
                    let (guest, edge) = (self.clone(), edge.clone());
                    asked.push(
                        self.sim.spawn(other.to_string(), async move { guest.ask(&edge, other).await }),
                    );
                }
            }
            if self.sim.rng().one_in(2) {
                self.sim.sleep(self.sim.rng().duration(Duration::ZERO, Duration::from_micros(300))).await;
            }
        }
        settle(&mut asked).await?;
        self.complete(&mut job).await?;
        disks.top.close().await.map_err(text)?;
        match disks.base {
            Some(base) => base.close().await.map_err(text),
            None => Ok(()),
        }
    }

    fn clip(&self, edge: &Edge, sectors: Range<u64>) -> Range<u64> {
        let end = edge.disk().size() / SECTOR;
        sectors.start.min(end)..sectors.end.min(end)
    }

    /// One request.
    async fn ask(&self, edge: &Edge, step: Step) -> Result<(), String> {
        let now = || self.recorder.now();
        let disk = edge.enter().await;
        let begin =
            |kind, sectors: &Range<u64>, fua| self.promises.begin(now(), kind, sectors.clone(), None, fua);
        let change = match step {
            Step::Write { tag, sectors, fua } => {
                let sectors = self.clip(edge, sectors);
                let change = begin(Kind::Fill(tag), &sectors, fua);
                let data = Buffer::copy_of(&fill(self.salt, tag, sectors.clone()));
                let done = disk
                    .write(
                        bytes_of(&sectors).start,
                        data,
                        WriteFlags { fua, compressed: self.workload.compresses(tag) },
                    )
                    .await;
                done.map(|()| change)
            }
            Step::Zero { sectors, unmap, fua } => {
                let sectors = self.clip(edge, sectors);
                let change = begin(Kind::Zero, &sectors, fua);
                let flags = ZeroFlags { unmap, fua, ..ZeroFlags::default() };
                let Range { start, end } = bytes_of(&sectors);
                disk.write_zeroes(start, end - start, flags).await.map(|()| change)
            }
            Step::Discard { sectors } => {
                let sectors = self.clip(edge, sectors);
                let change = begin(Kind::Discard, &sectors, false);
                let Range { start, end } = bytes_of(&sectors);
                disk.discard(start, end - start).await.map(|()| change)
            }
            _ => {
                let flush = self.promises.begin_flush(now());
                disk.flush().await.map_err(text)?;
                self.promises.flushed(flush, now());
                return Ok(());
            }
        };
        self.promises.ended(change.map_err(text)?, now());
        Ok(())
    }

    /// Nobody else does anything.
    async fn resize(&self, edge: &Edge, size: u64) -> Result<(), String> {
        let disk = edge.disk();
        let old = disk.size();
        let counted = self.workload == Workload::Snapshot || !self.snapshots.borrow().is_empty();
        if counted && size < old {
            return Ok(());
        }
        let sectors = old.min(size) / SECTOR..old.max(size) / SECTOR;
        let change = self.promises.begin(self.recorder.now(), Kind::Zero, sectors, Some(size), true);
        disk.resize(size).await.map_err(text)?;
        self.promises.ended(change, self.recorder.now());
        Ok(())
    }

    fn start(&self, disks: &Disks, edge: &Rc<Edge>) -> (JobHandle, Task<Outcome>) {
        const SMALL: Bounds = Bounds {
            least_copy: 1024,
            most_copy: 4096,
            least_copies: 2,
            start: 16 << 10,
            most: 32 << 10,
            far: false,
        };
        let bounds = Some(SMALL);
        match (&disks.base, self.workload) {
            (Some(base), Workload::CommitActive) => {
                let options =
                    MirrorOptions { granularity: Some(1024), bounds, ..self.pivot(edge, base.clone()) };
                let (job, work) = commit_active(disks.top.clone(), base.clone(), options);
                (job, self.sim.spawn("job", work))
            }
            (Some(base), _) => {
                let (top, lowest) = (disks.top.clone(), disks.lowest.clone());
                let mid = top.top().backing().expect("there is a layer between");
                let finish: headwater_job::Finish = Box::new(move || {
                    Box::pin(async move {
                        let link = BackingLink { name: "base", format: "qcow2" };
                        top.change_backing(Some(link), lowest).await
                    })
                });
                let options = CommitOptions { bounds, finish: Some(finish), ..CommitOptions::default() };
                let (job, work) = commit(mid, base.clone(), options);
                (job, self.sim.spawn("job", work))
            }
            (None, workload) => {
                let link = || Link { name: "base".to_string(), format: "raw".to_string() };
                let base = (workload == Workload::StreamAbove).then(|| disks.lowest.clone()).flatten();
                let base = base.map(|node| Base { node, link: link() });
                let options = StreamOptions {
                    base,
                    bounds,
                    detect_zeroes: self.sim.rng().one_in(2),
                    ..Default::default()
                };
                let (job, work) = stream(disks.top.clone(), options);
                (job, self.sim.spawn("job", work))
            }
        }
    }

    /// Leads the guest to the base when an active commit completes.
    fn pivot(&self, edge: &Rc<Edge>, base: Rc<Disk>) -> MirrorOptions {
        let held: Rc<RefCell<Weak<Drained>>> = Rc::default();
        let (holding, held_by) = (edge.clone(), held.clone());
        let (edge, guest) = (edge.clone(), self.clone());
        MirrorOptions {
            hold_guests: Some(Box::new(move || {
                let (edge, held) = (holding.clone(), held_by.clone());
                Box::pin(async move {
                    let drained = Rc::new(edge.drain().await);
                    held.replace(Rc::downgrade(&drained));
                    Box::new(drained) as Box<dyn Any>
                })
            })),
            finish: Some(Box::new(move || {
                Box::pin(async move {
                    edge.replace(&held.borrow().upgrade().expect("the guest is held back"), base);
                    guest.pivoted.set(Some(guest.recorder.now()));
                    Ok(())
                })
            })),
            ..MirrorOptions::default()
        }
    }

    async fn complete(&self, job: &mut Option<(JobHandle, Task<Outcome>)>) -> Result<(), String> {
        let Some((handle, work)) = job.take() else { return Ok(()) };
        if self.workload == Workload::CommitActive {
            while !handle.status().is_over() && handle.complete().is_err() {
                self.sim.sleep(Duration::from_millis(1)).await;
            }
        }
        let outcome = work.await;
        self.job_ended.set(Some((self.recorder.now(), matches!(outcome, Outcome::Completed))));
        match outcome {
            Outcome::Failed(err) => Err(format!("the job failed: {err}")),
            Outcome::Completed | Outcome::Cancelled => Ok(()),
        }
    }
}

async fn settle(asked: &mut Asked) -> Result<(), String> {
    for one in asked.drain(..) {
        one.await?;
    }
    Ok(())
}

/// Streams everything into an image that a power cut left, and gives the file's bytes.
pub(crate) fn stream_on(seed: u64, image: &[u8], world: &World) -> Result<Vec<u8>, String> {
    let sim = Sim::new(seed);
    sim.set_step_limit(4_000_000);
    let file = sim_file(&sim, "image", image, world.alignment);
    let header =
        crate::world::now(Header::read(&*headwater_block::memory::MemoryNode::new("image", image.to_vec())));
    let children = world.children(&header.map_err(text)?, &[])?;
    let options = world.options();
    let (here, written) = (sim.clone(), file.clone());
    sim.run(async move {
        let node = Qcow2Node::open(file, children, options).await.map_err(text)?;
        let disk = Disk::new(node, here.clock(), DiskOptions::default());
        let (_job, work) = stream(disk.clone(), StreamOptions::default());
        match work.await {
            Outcome::Completed => disk.close().await.map_err(text),
            other => Err(format!("the resumed stream ended with {other:?}")),
        }
    })?;
    let content = written.content();
    let mut bytes = vec![0; content.size() as usize];
    content.read(0, &mut bytes);
    Ok(bytes)
}
