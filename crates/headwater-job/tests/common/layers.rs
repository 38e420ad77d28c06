//! A chain whose lowest layer is a disk of its own, and guests who can be led to another disk: for commit and mirror.

use super::{Guest, Shape, filter, preset, source};
use headwater_block::chain::skip_filters;
use headwater_block::drain::Drained;
use headwater_block::node::BackingLink;
use headwater_block::{Buffer, Disk, DiskOptions, Error, ErrorKind, Node};
use headwater_job::{Finish, HoldGuests};
use headwater_sim::{Device, Fault, Model, Op, Pages, Sim, SimFile, SimFilter, SimOverlay};
use std::any::Any;
use std::cell::RefCell;
use std::ops::Deref;
use std::rc::{Rc, Weak};
use std::time::Duration;

/// The chain, with the disk that data are copied into.
pub struct Layers {
    pub guest: Guest,
    /// What is copied into: the lowest layer, or a disk beside the chain.
    pub target: Rc<Disk>,
    /// What lies below: a file, or an overlay on top of one.
    pub file: Rc<SimFile>,
    pub base: Option<Rc<SimOverlay>>,
    /// From the base upwards.
    pub middles: Vec<Rc<SimOverlay>>,
    pub top: Rc<SimOverlay>,
    /// What holds the bytes of a target beside the chain that is a file.
    pub target_file: Option<Rc<SimFile>>,
    held: Rc<RefCell<Weak<Drained>>>,
    /// What the disk read as when the guests were last held back.
    pub then: Rc<RefCell<Option<Buffer>>>,
}

impl Deref for Layers {
    type Target = Guest;
    fn deref(&self) -> &Guest {
        &self.guest
    }
}

impl Layers {
    /// A chain in which every layer holds some data and some zeroes. The base is a file, or an overlay.
    pub fn random(sim: &Sim, shape: &Shape) -> Self {
        let (file, mut content) = source(sim, shape, true);
        file.set_read_only(false);
        let base = sim.rng().one_in(2).then(|| {
            let unit = *sim.rng().pick(&[512, 2048, 8192]);
            let base = SimOverlay::new(sim, "base", shape.size, unit, 512, Some(file.clone()));
            preset(sim, &base, shape.size, u64::from(unit), 90, &mut content);
            base
        });
        Self::build(sim, shape, file, base, content, true)
    }

    /// A file full of data, and layers on top of it that hold nothing.
    pub fn plain(sim: &Sim, shape: &Shape) -> Self {
        let (file, content) = source(sim, shape, false);
        file.set_read_only(false);
        Self::build(sim, shape, file, None, content, false)
    }

    fn build(
        sim: &Sim,
        shape: &Shape,
        file: Rc<SimFile>,
        base: Option<Rc<SimOverlay>>,
        mut content: Vec<u8>,
        random: bool,
    ) -> Self {
        let lowest: Rc<dyn Node> = match &base {
            Some(base) => base.clone(),
            None => file.clone(),
        };
        let target = Disk::new(lowest, sim.clock(), DiskOptions::default());
        let mut below: Rc<dyn Node> = SimFilter::new(sim, "filter of base", target.clone());
        let mut middles = Vec::new();
        for n in 0..=shape.middles {
            let is_top = n == shape.middles;
            let name = if is_top { "top".to_string() } else { format!("middle{n}") };
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
        let guest = Guest::new(sim, disk, Model::new(&content));
        let (held, then) = (Rc::default(), Rc::default());
        Self { guest, target, file, base, middles, top, target_file: None, held, then }
    }

    /// Copies go to another disk, of the same size, which holds something else. With a backing it lacks everything.
    pub fn with_target_beside(mut self, backing: Option<Rc<dyn Node>>) -> Self {
        let size = self.guest.disk.size();
        let target: Rc<dyn Node> = match backing {
            Some(backing) => SimOverlay::new(&self.guest.sim, "target", size, 1024, 512, Some(backing)),
            None => {
                let mut pages = Pages::new(size, 512);
                pages.write(0, &vec![0xaa; size as usize]);
                let file = SimFile::new(&self.guest.sim, "target", pages);
                self.target_file = Some(file.clone());
                file
            }
        };
        self.target = Disk::new(target, self.guest.sim.clock(), DiskOptions::default());
        self
    }

    /// Every device of the chain.
    pub fn devices(&self) -> Vec<&Device> {
        let overlays = self.middles.iter().chain(&self.base).chain([&self.top]);
        let mut devices: Vec<&Device> = vec![&self.file];
        overlays.for_each(|overlay| devices.extend([overlay as &Device, overlay.data()]));
        devices
    }

    pub fn repair(&self) {
        self.devices().into_iter().for_each(Device::repair);
    }

    /// The layers above the base vanish.
    pub fn lose_upper_layers(&self) {
        for layer in self.middles.iter().chain([&self.top]) {
            layer.fail(Fault::always(&[Op::Read, Op::Status, Op::Write, Op::WriteZeroes], ErrorKind::Io));
        }
    }

    /// The layers that are no longer below `top` vanish.
    pub fn lose_layers_that_are_not_below(&self, top: &Rc<SimOverlay>) {
        let mut below = Vec::new();
        let mut at = top.backing();
        while let Some(node) = at {
            below.push(skip_filters(&node));
            at = node.backing();
        }
        for middle in &self.middles {
            let node: Rc<dyn Node> = middle.clone();
            if !below.iter().any(|below| Rc::ptr_eq(below, &node)) {
                middle.fail(Fault::always(&[Op::Read, Op::Status], ErrorKind::Io));
            }
        }
    }

    /// Holds the guests back at their edge, and notes what the disk then reads as.
    pub fn hold_guests(&self) -> HoldGuests {
        let (guest, held, then) = (self.guest.clone(), self.held.clone(), self.then.clone());
        Box::new(move || {
            let (guest, held, then) = (guest.clone(), held.clone(), then.clone());
            Box::pin(async move {
                let drained = Rc::new(guest.edge.drain().await);
                let content = loop {
                    // Storage fails now and then.
                    match guest.disk.read_beside_guests(0..guest.disk.size()).await {
                        Ok(content) => break content,
                        Err(_) => guest.sim.sleep(Duration::from_micros(100)).await,
                    }
                };
                then.replace(Some(content));
                held.replace(Rc::downgrade(&drained));
                Box::new(drained) as Box<dyn Any>
            })
        })
    }

    /// Leads the guests to the target, or fails to.
    pub fn pivot(&self, fails: bool) -> Finish {
        let (edge, target, held) = (self.edge.clone(), self.target.clone(), self.held.clone());
        Box::new(move || {
            Box::pin(async move {
                let drained = held.borrow().upgrade().expect("the guests are held back");
                if fails {
                    return Err(Error::new(ErrorKind::Io, "the graph can't be changed"));
                }
                edge.replace(&drained, target);
                Ok(())
            })
        })
    }

    /// Puts the base below a layer.
    pub fn drop_below(&self, above: &Rc<SimOverlay>) -> Finish {
        let (above, base) = (above.clone(), SimFilter::new(&self.sim, "base", self.target.clone()));
        Box::new(move || {
            Box::pin(async move {
                let link = BackingLink { name: "base", format: "sim" };
                above.change_backing(Some(link), Some(base)).await
            })
        })
    }

    /// True if the guests were led to the target.
    pub fn is_pivoted(&self) -> bool {
        Rc::ptr_eq(&self.edge.disk(), &self.target)
    }

    /// Checks that the target holds what the disk read as when the guests were last held back.
    pub async fn check_copy(&self) {
        let expected = self.then.borrow().clone().expect("the guests were held back");
        let copy = self.target.read(0, expected.len() as u64).await.expect("the target can be read");
        let differs = copy.iter().zip(&expected[..]).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the copy differs from the disk at that offset");
    }
}
