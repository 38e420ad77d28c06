//! The two ways in which clusters are compressed, without I/O.

use super::header::Compression;
use std::io::Read;

/// The largest window, as a power of two, that a zstd frame may ask for: more than any cluster needs.
const MAX_ZSTD_WINDOW: u32 = 23;
/// The window of the deflate streams that are written, as a power of two. Readers needn't have a larger one: QEMU's has not.
const DEFLATE_WINDOW: u8 = 12;

/// Compresses a cluster; `None` if that doesn't make it smaller.
pub(super) fn deflate(compression: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let room = cluster.len() - 1;
    match compression {
        Compression::Zlib => {
            let level = flate2::Compression::default();
            let mut stream = flate2::Compress::new_with_window_bits(level, false, DEFLATE_WINDOW);
            let mut out = vec![0; room];
            let done = stream.compress(cluster, &mut out, flate2::FlushCompress::Finish);
            out.truncate(stream.total_out() as usize);
            matches!(done, Ok(flate2::Status::StreamEnd)).then_some(out)
        }
        Compression::Zstd => {
            let mut out = vec![0; room];
            // It fails if there isn't room for all of it.
            let len =
                zstd::bulk::compress_to_buffer(cluster, &mut out, zstd::DEFAULT_COMPRESSION_LEVEL).ok()?;
            out.truncate(len);
            Some(out)
        }
    }
}

/// Fills `out` from `packed`, which may have anything after its end.
pub(super) fn inflate(compression: Compression, packed: &[u8], out: &mut [u8]) -> Result<(), String> {
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
    use headwater_sim::Rng;

    #[test]
    fn both_methods_stop_at_the_cluster_and_refuse_garbage() {
        let data: Vec<u8> = (0..4096u32).map(|i| (i / 7) as u8).collect();
        for method in [Compression::Zlib, Compression::Zstd] {
            let mut packed = deflate(method, &data).expect("it gets smaller");
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

    #[test]
    fn what_does_not_get_smaller_is_not_compressed() {
        let rng = Rng::new(7);
        for size in [512, 4096, 65536, 2 << 20] {
            let noise: Vec<u8> = (0..size).map(|_| rng.range(0..256) as u8).collect();
            for method in [Compression::Zlib, Compression::Zstd] {
                assert_eq!(deflate(method, &noise), None);
                assert!(deflate(method, &vec![0; size]).is_some_and(|packed| packed.len() < size / 2));
            }
        }
    }

    #[test]
    fn a_reader_with_a_small_window_is_enough() {
        // The same 6000 random bytes again and again: only a larger window sees that.
        let rng = Rng::new(8);
        let block: Vec<u8> = (0..6000).map(|_| rng.range(0..64) as u8).collect();
        let data: Vec<u8> = block.iter().copied().cycle().take(65536).collect();
        let packed = deflate(Compression::Zlib, &data).expect("six bits of eight");
        // In small pieces, so that what was written before is no substitute for the window.
        let mut stream = flate2::Decompress::new_with_window_bits(false, DEFLATE_WINDOW);
        let mut out = Vec::new();
        while out.len() < data.len() {
            let mut piece = [0; 100];
            let (from, before) = (stream.total_in() as usize, stream.total_out());
            stream.decompress(&packed[from..], &mut piece, flate2::FlushDecompress::None).unwrap();
            out.extend_from_slice(&piece[..(stream.total_out() - before) as usize]);
        }
        assert!(out == data);
    }
}
