//! Images in memory: made, filled, looked at.

use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;
use headwater_block::{Buffer, Node, WriteFlags, ZeroFlags};
use headwater_image::qcow2::create::{CreateOptions, create};
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use std::rc::Rc;

/// The result of a future that never has to wait, as those over memory.
pub(super) fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory never waits")
}

/// A new image.
pub(super) fn created(options: &CreateOptions) -> Vec<u8> {
    let file = MemoryNode::new("seed.qcow2", Vec::new());
    now(create(&*file, options)).expect("seeds are possible images");
    file.contents()
}

/// What an overlay lacks comes from here: data with holes, longer or shorter than the disk.
pub(super) fn backing() -> Rc<dyn Node> {
    let bytes =
        (0..40_700).map(|at| if at / 1000 % 3 == 0 { 0 } else { (at / 512 % 256) as u8 | 1 }).collect();
    let node = MemoryNode::new("base.raw", bytes);
    node.set_read_only(true);
    node
}

/// A new image with some data, zeroes and holes.
pub(super) fn filled(options: &CreateOptions) -> Vec<u8> {
    let file = MemoryNode::new("seed.qcow2", Vec::new());
    let done = async {
        create(&*file, options).await?;
        let children = Children {
            data_file: options
                .data_file
                .is_some()
                .then(|| MemoryNode::new("data.raw", Vec::new()) as Rc<dyn Node>),
            backing: options.backing.is_some().then(backing),
        };
        let node = Qcow2Node::open(file.clone(), children, Qcow2Options::default()).await?;
        let unit = options.cluster_size;
        for (at, len) in [(0, unit), (3 * unit, 100), (options.size - 512, 512)] {
            node.write(at, Buffer::copy_of(&vec![at as u8 | 1; len as usize]), WriteFlags::default()).await?;
        }
        let unmap = ZeroFlags { unmap: true, ..ZeroFlags::default() };
        node.write_zeroes(unit, 2 * unit, unmap).await?;
        node.write_zeroes(5 * unit, unit, ZeroFlags::default()).await?;
        node.discard(0, unit / 2).await?;
        node.close().await
    };
    now(done).expect("seeds are possible images");
    file.contents()
}
