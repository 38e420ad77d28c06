//! Reading compressed clusters.

use super::codec::inflate;
use super::image::Image;
use headwater_block::{Buffer, BufferMut, DebugEvent, Result};
use std::collections::VecDeque;

/// How many bytes of inflated clusters are kept, so that small sequential reads don't inflate a cluster again and again.
const KEPT_BYTES: usize = 2 << 20;

/// The clusters that were inflated last, by where their compressed bytes are.
///
/// What is kept is what the file holds there: it is forgotten when the place is given to another cluster, and what was read from the file
/// before that isn't kept afterwards.
#[derive(Default)]
pub(super) struct Inflated {
    clusters: VecDeque<(u64, Buffer)>,
    /// How often something was forgotten.
    forgotten: u64,
}

impl Inflated {
    /// Other bytes will be written at this offset of the file.
    pub(super) fn forget(&mut self, offset: u64) {
        self.forgotten += 1;
        self.clusters.retain(|(at, _)| *at != offset);
    }
}

impl Image {
    /// Fills `buf` from byte `start` of the compressed cluster at `offset` of the file.
    pub(super) async fn read_compressed(
        &self,
        offset: u64,
        len: u64,
        start: usize,
        mut buf: BufferMut,
    ) -> Result<BufferMut> {
        let (kept, forgotten) = {
            let inflated = self.inflated.borrow();
            let kept = inflated.clusters.iter().find(|(at, _)| *at == offset);
            (kept.map(|(_, data)| data.clone()), inflated.forgotten)
        };
        let cluster = match kept {
            Some(cluster) => cluster,
            None => {
                self.events.tell(DebugEvent::ReadCompressed);
                let packed = self.file.read(offset, BufferMut::new(len as usize)).await?;
                let mut cluster = BufferMut::new(self.geometry.cluster_size() as usize);
                let compression = self.header.borrow().header.compression;
                inflate(compression, &packed, &mut cluster).map_err(|why| {
                    self.corrupt(format_args!("the compressed cluster at file offset {offset:#x}: {why}"))
                })?;
                let cluster = cluster.freeze();
                let mut inflated = self.inflated.borrow_mut();
                if inflated.forgotten == forgotten {
                    inflated.clusters.push_front((offset, cluster.clone()));
                    inflated.clusters.truncate((KEPT_BYTES / cluster.len()).max(1));
                }
                cluster
            }
        };
        let len = buf.len();
        buf.copy_from_slice(&cluster[start..start + len]);
        Ok(buf)
    }
}
