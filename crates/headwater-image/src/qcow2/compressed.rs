//! Compressed clusters, which are only read.

use super::header::Compression;
use super::image::Image;
use headwater_block::{Buffer, BufferMut, DebugEvent, Result};
use std::collections::VecDeque;
use std::io::Read;

/// How many bytes of inflated clusters are kept, so that small sequential reads don't inflate a cluster again and again.
const KEPT_BYTES: usize = 2 << 20;
/// The largest window, as a power of two, that a zstd frame may ask for: more than any cluster needs.
const MAX_ZSTD_WINDOW: u32 = 23;

/// The clusters that were inflated last, by where their compressed bytes are.
///
/// An entry never goes stale while it can be found: compressed bytes are never written here, so an L2 entry that points to an offset has
/// pointed there since the image was opened.
#[derive(Default)]
pub(super) struct Inflated(VecDeque<(u64, Buffer)>);

impl Image {
    /// Fills `buf` from byte `start` of the compressed cluster at `offset` of the file.
    pub(super) async fn read_compressed(
        &self,
        offset: u64,
        len: u64,
        start: usize,
        mut buf: BufferMut,
    ) -> Result<BufferMut> {
        let kept =
            self.inflated.borrow().0.iter().find(|(at, _)| *at == offset).map(|(_, data)| data.clone());
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
                inflated.0.push_front((offset, cluster.clone()));
                inflated.0.truncate((KEPT_BYTES / cluster.len()).max(1));
                cluster
            }
        };
        let len = buf.len();
        buf.copy_from_slice(&cluster[start..start + len]);
        Ok(buf)
    }
}

/// Fills `out` from `packed`, which may have anything after its end.
fn inflate(compression: Compression, packed: &[u8], out: &mut [u8]) -> std::result::Result<(), String> {
    match compression {
        Compression::Zlib => {
            let mut stream = flate2::Decompress::new(false);
            let result = stream.decompress(packed, out, flate2::FlushDecompress::Finish);
            let there = stream.total_out();
            match result {
                _ if there == out.len() as u64 => Ok(()),
                Ok(_) => Err(format!("it holds {there} bytes, not {}", out.len())),
                Err(err) => Err(format!("it can't be inflated: {err}")),
            }
        }
        Compression::Zstd => {
            let describe = |err: std::io::Error| format!("it can't be decompressed: {err}");
            let mut stream =
                zstd::stream::read::Decoder::with_buffer(packed).map_err(describe)?.single_frame();
            stream.window_log_max(MAX_ZSTD_WINDOW).map_err(describe)?;
            stream.read_exact(out).map_err(describe)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn both_methods_stop_at_the_cluster_and_refuse_garbage() {
        let data: Vec<u8> = (0..4096u32).map(|i| (i / 7) as u8).collect();
        let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        deflate.write_all(&data).unwrap();
        let deflated = deflate.finish().unwrap();
        let zstd = zstd::stream::encode_all(&data[..], 3).unwrap();
        for (method, mut packed) in [(Compression::Zlib, deflated), (Compression::Zstd, zstd)] {
            let mut out = vec![0; data.len()];
            let half = packed.len() / 2;
            packed.extend_from_slice(&[0xa5; 300]);
            inflate(method, &packed, &mut out).unwrap();
            assert_eq!(out, data);
            assert!(inflate(method, &packed[..half], &mut out).is_err());
            assert!(inflate(method, &[0xff; 100], &mut out).is_err());
            assert!(inflate(method, &[], &mut out).is_err());
            let mut longer = vec![0; data.len() + 1];
            assert!(inflate(method, &packed, &mut longer).is_err());
        }
    }
}
