//! A simulated disk for the tests of jobs: a chain of small overlays over a source, and what it reads as.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use headwater_block::{Buffer, DetectZeroes, Disk, DiskOptions, Node, WriteFlags, ZeroFlags};
use headwater_job::window::Bounds;
use headwater_job::{Base, Link, StreamOptions};
use headwater_sim::{Fill, Model, Pages, Sim, SimFile, SimOverlay};
use std::rc::Rc;

/// What a world looks like.
pub struct Shape {
    pub size: u64,
    pub unit: u32,
    pub alignment: u32,
    /// Overlays between the source and the top.
    pub middles: usize,
    pub source_size: u64,
    pub options: DiskOptions,
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
                read_only: false,
            },
        }
    }
}

/// A disk in the simulator.
pub struct World {
    pub sim: Sim,
    pub source: Rc<SimFile>,
    /// From the source upwards.
    pub middles: Vec<Rc<SimOverlay>>,
    pub top: Rc<SimOverlay>,
    pub disk: Rc<Disk>,
    pub model: Rc<Model>,
    pub content: Vec<u8>,
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
        let mut below: Rc<dyn Node> = source.clone();
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
            below = layer.clone();
            middles.push(layer);
        }
        let top = middles.pop().expect("at least the top");
        let disk = Disk::new(top.clone(), sim.clock(), shape.options);
        let model = Model::new(&content);
        Self { sim: sim.clone(), source, middles, top, disk, model, content }
    }

    /// The layers below the top, from the source upwards.
    pub fn layers(&self) -> Vec<Rc<dyn Node>> {
        let mut layers: Vec<Rc<dyn Node>> = vec![self.source.clone()];
        layers.extend(self.middles.iter().map(|middle| middle.clone() as Rc<dyn Node>));
        layers
    }

    /// A guest's read, checked.
    pub async fn read(&self, range: std::ops::Range<u64>) -> headwater_block::Result<()> {
        let reading = self.model.begin_read(range.clone());
        let data = self.disk.read(range.start, range.end - range.start).await?;
        reading.check(&data);
        Ok(())
    }

    /// A guest's write.
    pub async fn write(&self, range: std::ops::Range<u64>, tag: u8) -> headwater_block::Result<()> {
        let fill = Fill::Pattern(tag);
        let mutation = self.model.begin(range.clone(), fill);
        let data = Buffer::copy_of(&fill.bytes(range.clone()));
        let fua = self.sim.rng().one_in(8);
        self.disk.write(range.start, data, WriteFlags { fua }).await?;
        mutation.done();
        Ok(())
    }

    /// A guest's zero-write.
    pub async fn zero(&self, range: std::ops::Range<u64>, unmap: bool) -> headwater_block::Result<()> {
        let mutation = self.model.begin(range.clone(), Fill::Zero);
        let flags = ZeroFlags { unmap, ..ZeroFlags::default() };
        self.disk.write_zeroes(range.start, range.end - range.start, flags).await?;
        mutation.done();
        Ok(())
    }

    /// A guest's discard.
    pub async fn discard(&self, range: std::ops::Range<u64>) -> headwater_block::Result<()> {
        let mutation = self.model.begin_discard(range.clone());
        self.disk.discard(range.start, range.end - range.start).await?;
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

fn preset(sim: &Sim, layer: &SimOverlay, size: u64, unit: u64, tag: u8, content: &mut [u8]) {
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
pub const SMALL: Bounds =
    Bounds { least_copy: 1024, most_copy: 4096, least_copies: 2, start: 32 << 10, most: 64 << 10 };

pub fn small_options() -> StreamOptions {
    StreamOptions { bounds: Some(SMALL), detect_zeroes: true, ..StreamOptions::default() }
}

pub fn base(node: &Rc<dyn Node>) -> Base {
    Base { node: node.clone(), link: Link { name: node.name().to_string(), format: "sim".to_string() } }
}
