//! A simulated disk for the tests of jobs: a chain of small overlays over a source, guests that use it, and what it reads as.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

pub mod image;
pub mod layers;

use headwater_block::{
    Abort, Buffer, Client, DetectZeroes, Disk, DiskOptions, Edge, Node, WriteFlags, ZeroFlags,
};
use headwater_job::window::Bounds;
use headwater_job::{Base, BootTrace, JobHandle, Link, StreamOptions};
use headwater_sim::{Fill, Model, Pages, Sim, SimFile, SimFilter, SimOverlay};
use std::ops::{Deref, Range};
use std::rc::Rc;
use std::time::Duration;

/// What a world looks like.
pub struct Shape {
    pub size: u64,
    pub unit: u32,
    pub alignment: u32,
    /// Overlays between the source and the top.
    pub middles: usize,
    pub source_size: u64,
    pub options: DiskOptions,
    /// Filters lie between the layers.
    pub filters: bool,
}

impl Shape {
    /// Clusters of 1 KiB, no layers in between, and a source that is full.
    pub fn plain(size: u64) -> Self {
        Self {
            size,
            unit: 1024,
            alignment: 512,
            middles: 0,
            source_size: size,
            options: DiskOptions::default(),
            filters: false,
        }
    }

    pub fn random(sim: &Sim) -> Self {
        let rng = sim.rng();
        let unit = *rng.pick(&[512, 1024, 4096, 8192]);
        let alignment = *rng.pick(&[1, 512, unit]);
        let size = if rng.one_in(2) { 64 << 10 } else { rng.range(1 << 10..96 << 10) };
        Self {
            size,
            unit,
            alignment,
            middles: rng.index(3),
            source_size: if rng.one_in(2) { size } else { rng.range(1..128 << 10) },
            options: DiskOptions {
                copy_on_read: rng.one_in(2),
                detect_zeroes: *rng.pick(&[DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap]),
                ..DiskOptions::default()
            },
            filters: rng.one_in(3),
        }
    }
}

/// A disk in the simulator, as its guests see it.
#[derive(Clone)]
pub struct Guest {
    pub sim: Sim,
    /// The disk that they use in the beginning.
    pub disk: Rc<Disk>,
    /// How they reach it.
    pub edge: Rc<Edge>,
    pub client: Rc<Client>,
    /// Thrown when they leave.
    pub leaves: Rc<Abort>,
    pub model: Rc<Model>,
}

/// A disk in the simulator, and what it is made of.
pub struct World {
    pub guest: Guest,
    pub source: Rc<SimFile>,
    /// From the source upwards.
    pub middles: Vec<Rc<SimOverlay>>,
    pub top: Rc<SimOverlay>,
}

impl Deref for World {
    type Target = Guest;
    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl World {
    /// A world whose source is full of data, and whose overlays hold nothing.
    pub fn full(sim: &Sim, shape: &Shape) -> Self {
        Self::build(sim, shape, false)
    }

    /// A world in which every layer holds some data and some zeroes.
    pub fn random(sim: &Sim, shape: &Shape) -> Self {
        Self::build(sim, shape, true)
    }

    fn build(sim: &Sim, shape: &Shape, random: bool) -> Self {
        let (source, mut content) = source(sim, shape, random);
        let mut below: Rc<dyn Node> =
            if shape.filters { filter(sim, source.clone()) } else { source.clone() };
        let mut middles = Vec::new();
        for n in 0..=shape.middles {
            let is_top = n == shape.middles;
            let name = if is_top { "top".to_string() } else { format!("middle{n}") };
            // Layers need not have the same clusters.
            let (unit, alignment) = if is_top { (shape.unit, shape.alignment) } else { (2048, 512) };
            let layer = SimOverlay::new(sim, &name, shape.size, unit, alignment, Some(below.clone()));
            if random {
                preset(sim, &layer, shape.size, u64::from(unit), n as u8 + 2, &mut content);
            }
            below = if shape.filters && !is_top { filter(sim, layer.clone()) } else { layer.clone() };
            middles.push(layer);
        }
        let top = middles.pop().expect("at least the top");
        let disk = Disk::new(top.clone(), sim.clock(), shape.options);
        let model = Model::new(&content);
        Self { guest: Guest::new(sim, disk, model), source, middles, top }
    }

    /// The layers below the top, from the source upwards.
    pub fn layers(&self) -> Vec<Rc<dyn Node>> {
        let mut layers: Vec<Rc<dyn Node>> = vec![self.source.clone()];
        layers.extend(self.middles.iter().map(|middle| middle.clone() as Rc<dyn Node>));
        layers
    }
}

impl Guest {
    pub fn new(sim: &Sim, disk: Rc<Disk>, model: Rc<Model>) -> Self {
        let (edge, leaves) = (Edge::new(disk.clone()), Abort::new());
        let client = Rc::new(Client::new(edge.clone(), leaves.clone()));
        Self { sim: sim.clone(), edge, client, leaves, disk, model }
    }

    /// A guest's read, checked.
    pub async fn read(&self, range: Range<u64>) -> headwater_block::Result<()> {
        let reading = self.model.begin_read(range.clone());
        let data = self.client.read(range.start, range.end - range.start).await?;
        reading.check(&data);
        Ok(())
    }

    /// A guest's write.
    pub async fn write(&self, range: Range<u64>, tag: u8) -> headwater_block::Result<()> {
        let fill = Fill::Pattern(tag);
        let mutation = self.model.begin(range.clone(), fill);
        let data = Buffer::copy_of(&fill.bytes(range.clone()));
        let fua = self.sim.rng().one_in(8);
        self.client.write(range.start, data, WriteFlags { fua, ..WriteFlags::default() }).await?;
        mutation.done();
        Ok(())
    }

    /// A guest's zero-write.
    pub async fn zero(&self, range: Range<u64>, unmap: bool) -> headwater_block::Result<()> {
        let mutation = self.model.begin(range.clone(), Fill::Zero);
        let flags = ZeroFlags { unmap, ..ZeroFlags::default() };
        self.client.write_zeroes(range.start, range.end - range.start, flags).await?;
        mutation.done();
        Ok(())
    }

    /// A guest's discard.
    pub async fn discard(&self, range: Range<u64>) -> headwater_block::Result<()> {
        let mutation = self.model.begin_discard(range.clone());
        self.edge.enter().await.discard(range.start, range.end - range.start).await?;
        mutation.done();
        Ok(())
    }

    /// Reads the whole disk and checks it, in pieces and then at once.
    pub async fn check_all(&self) {
        for _ in 0..2 {
            self.read(0..self.disk.size()).await.expect("the disk can be read");
        }
    }
}

/// A filter on top of a layer, which it reaches through a disk.
pub fn filter(sim: &Sim, layer: Rc<dyn Node>) -> Rc<dyn Node> {
    let name = format!("filter of {}", layer.name());
    SimFilter::new(sim, &name, Disk::new(layer, sim.clock(), DiskOptions::default()))
}

/// The source, and what the disk reads as while nothing lies above it.
pub fn source(sim: &Sim, shape: &Shape, random: bool) -> (Rc<SimFile>, Vec<u8>) {
    let rng = sim.rng();
    let mut content = vec![0; shape.size as usize];
    let mut pages = Pages::new(shape.source_size, 512);
    let mut pos = 0;
    while pos < shape.source_size {
        let run = if random { 512 * (1 + rng.range(0..20)) } else { shape.source_size };
        let end = (pos + run).min(shape.source_size);
        match if random { rng.range(0..4) } else { 0 } {
            // A hole, and zeroes that are data.
            0 if random => {}
            1 => pages.write(pos, &vec![0; (end - pos) as usize]),
            _ => pages.write(pos, &Fill::Pattern(1).bytes(pos..end)),
        }
        pos = end;
    }
    let seen = content.len().min(shape.source_size as usize);
    pages.read(0, &mut content[..seen]);
    let source = SimFile::new(sim, "source", pages);
    source.set_read_only(true);
    (source, content)
}

/// Fills a layer with some data and some zeroes, and `content` with what then reads there.
pub fn preset(sim: &Sim, layer: &SimOverlay, size: u64, unit: u64, tag: u8, content: &mut [u8]) {
    let mut pos = 0;
    while pos < size {
        let end = (pos + unit * (1 + sim.rng().range(0..6))).min(size);
        let fill = match sim.rng().range(0..4) {
            0 => Some(Fill::Pattern(tag)),
            1 => Some(Fill::Zero),
            _ => None,
        };
        if let Some(fill) = fill {
            let bytes = fill.bytes(pos..end);
            content[pos as usize..end as usize].copy_from_slice(&bytes);
            layer.preset(pos..end, (fill != Fill::Zero).then_some(&bytes[..]));
        }
        pos = end;
    }
}

/// A window that fits a small disk.
pub const SMALL: Bounds = Bounds {
    least_copy: 1024,
    most_copy: 4096,
    least_copies: 2,
    start: 32 << 10,
    most: 64 << 10,
    far: false,
};

pub fn small_options() -> StreamOptions {
    StreamOptions { bounds: Some(SMALL), detect_zeroes: true, ..StreamOptions::default() }
}

pub fn base(node: &Rc<dyn Node>) -> Base {
    Base { node: node.clone(), link: Link { name: node.name().to_string(), format: "sim".to_string() } }
}

/// A boot trace from anybody.
pub fn random_trace(sim: &Sim, size: u64) -> BootTrace {
    let rng = sim.rng();
    let mut text = "headwater boot trace 1\n".to_owned();
    for at in 0..rng.range(0..20) {
        // Some reach past the end, some overlap.
        text.push_str(&format!("{at} {} {}\n", rng.range(0..size * 5 / 4), rng.range(0..size / 4)));
    }
    BootTrace::parse(&text).expect("a trace")
}

/// A guest that does `ops` random things.
pub async fn busy(guest: Guest, ops: u64) {
    let rng = guest.sim.rng().clone();
    let size = guest.disk.size();
    for _ in 0..ops {
        let range = rng.byte_range(size, 12 << 10, 1024);
        // A request may fail when storage does; what it did then is in doubt, which the model knows, until it is read.
        let done = match rng.range(0..10) {
            0..4 => guest.read(range.clone()).await,
            4..6 => guest.write(range.clone(), 10 + rng.range(0..100) as u8).await,
            6 => guest.zero(range.clone(), rng.one_in(2)).await,
            7..9 => guest.discard(range.clone()).await,
            _ => guest.edge.enter().await.flush().await,
        };
        if done.is_err() {
            let _failed_again = guest.read(range).await;
        }
        if rng.one_in(2) {
            guest.sim.sleep(rng.duration(Duration::ZERO, Duration::from_micros(400))).await;
        }
    }
}

/// Someone who gives a job random commands, and holds all requests back now and then.
pub async fn commander(guest: Guest, job: JobHandle) {
    let rng = guest.sim.rng().clone();
    while !job.status().is_over() {
        guest.sim.sleep(rng.duration(Duration::ZERO, Duration::from_micros(500))).await;
        // A command may come when the state doesn't allow it: then it is refused and changes nothing.
        let _refused = match rng.range(0..7) {
            0 => job.pause(),
            1 | 2 => job.resume(),
            3 => job.set_speed(*rng.pick(&[0, 1 << 20, 100 << 20])),
            4 => job.finalize(),
            5 => {
                let drained = guest.disk.drain().await;
                assert_eq!(guest.disk.stats().in_flight.get(), 0);
                guest.sim.sleep(rng.duration(Duration::ZERO, Duration::from_micros(300))).await;
                drop(drained);
                Ok(())
            }
            _ => Ok(()),
        };
    }
}

/// Someone who keeps a job going that waits for somebody.
pub async fn helper(sim: Sim, job: JobHandle) {
    while !job.status().is_over() {
        sim.sleep(Duration::from_millis(20)).await;
        let _ = job.resume();
        let _ = job.finalize();
        let _ = job.set_speed(0);
    }
}
