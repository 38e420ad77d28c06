//! qcow2 images in the simulator.

use headwater_block::Node;
use headwater_image::Format;
use headwater_image::qcow2::create::CreateOptions;
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_sim::{Pages, Sim, SimFile};
use std::rc::Rc;

/// An image of some shape, in a file.
pub struct Image {
    pub file: Rc<SimFile>,
    pub create: CreateOptions,
    cache_size: u64,
}

impl Image {
    pub fn random(sim: &Sim, size: u64) -> Self {
        let rng = sim.rng();
        let version = if rng.one_in(5) { 2 } else { 3 };
        let cluster_bits = *rng.pick(&[9, 9, 10, 11, 12, 13, 14, 14, 16]);
        let mut create = CreateOptions::new(size);
        create.version = version;
        create.cluster_size = 1 << cluster_bits;
        create.backing = Some(("source".into(), Format::Raw));
        if version == 3 {
            create.refcount_bits = 1 << rng.range(0..7);
            create.extended_l2 = cluster_bits >= 14 && rng.one_in(2);
        }
        let file = SimFile::new(sim, "image", Pages::new(0, 512));
        Self { file, create, cache_size: *rng.pick(&[0, 4096, 32 << 20]) }
    }

    pub async fn open(&self, backing: Option<Rc<dyn Node>>) -> Rc<Qcow2Node> {
        let children = Children { data_file: None, backing };
        let options =
            Qcow2Options { read_only: false, cache_size: self.cache_size, ..Qcow2Options::default() };
        Qcow2Node::open(self.file.clone(), children, options).await.expect("the image opens")
    }
}
