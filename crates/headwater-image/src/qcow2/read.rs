//! Reading: all parts of a request at once.

use super::image::Image;
use super::map::{Run, Target};
use futures_util::stream::{FuturesOrdered, StreamExt};
use headwater_block::{BufferMut, DebugEvent, Result};

impl Image {
    /// [`headwater_block::Node::read`].
    pub(super) async fn read(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        if buf.is_empty() {
            return Ok(buf);
        }
        let end = offset.saturating_add(buf.len() as u64);
        let mut run = self.run_or_end(offset, end).await?;
        if run.len == buf.len() as u64 {
            return self.read_run(run.target, offset, buf).await;
        }
        // All look-ups come first, so that the I/Os start together.
        let mut parts = Vec::new();
        let mut at = offset;
        while run.len < buf.len() as u64 {
            let rest = buf.split_off(run.len as usize);
            parts.push((run.target, at, buf));
            buf = rest;
            at += run.len;
            run = self.run_or_end(at, end).await?;
        }
        parts.push((run.target, at, buf));
        let mut reads: FuturesOrdered<_> =
            parts.into_iter().map(|(target, at, part)| self.read_run(target, at, part)).collect();
        let mut whole: Option<BufferMut> = None;
        while let Some(part) = reads.next().await {
            let part = part?;
            whole = Some(match whole {
                Some(whole) => whole.join(part),
                None => part,
            });
        }
        Ok(whole.expect("a request that isn't empty has parts"))
    }

    async fn run_or_end(&self, at: u64, end: u64) -> Result<Run> {
        let size = self.size.get();
        if at >= size {
            return Ok(Run { target: Target::Zero, len: end - at });
        }
        self.run(at..end.min(size)).await
    }

    async fn read_run(&self, target: Target, at: u64, mut buf: BufferMut) -> Result<BufferMut> {
        match target {
            Target::Data(host) => {
                self.events.tell(DebugEvent::ReadAio);
                self.data_node().read(host, buf).await
            }
            Target::Zero => {
                buf.fill(0);
                Ok(buf)
            }
            Target::Compressed { offset, len } => {
                let start = (at - self.cluster_start(at)) as usize;
                self.read_compressed(offset, len, start, buf).await
            }
            Target::Unallocated => {
                let backing = self.backing.borrow().clone();
                match backing.filter(|backing| backing.size() > at) {
                    Some(backing) => {
                        self.events.tell(DebugEvent::ReadBackingAio);
                        backing.read(at, buf).await
                    }
                    None => {
                        buf.fill(0);
                        Ok(buf)
                    }
                }
            }
        }
    }
}
