//! Random images and chains.

use super::tools::{contents, qemu_io, run};
use headwater_image::Format;
use headwater_image::qcow2::create::CreateOptions;
use headwater_image::qcow2::header::Compression;
use rand::Rng;
use rand::rngs::StdRng;
use std::path::Path;

/// What an image is like.
#[derive(Debug, Clone)]
pub(crate) struct Geometry {
    pub(crate) size: u64,
    pub(crate) cluster_bits: u32,
    pub(crate) version: u32,
    pub(crate) refcount_bits: u32,
    pub(crate) extended_l2: bool,
    pub(crate) data_file: bool,
    /// Compressed clusters are zstd, not zlib.
    pub(crate) zstd: bool,
}

impl Geometry {
    pub(crate) fn random(rng: &mut StdRng, backing: bool) -> Self {
        let version = if rng.random_bool(0.2) { 2 } else { 3 };
        let extended_l2 = version == 3 && rng.random_bool(0.3);
        let cluster_bits = rng.random_range(if extended_l2 { 14..=17 } else { 9..=17 });
        let most = (96 << cluster_bits).clamp(64 << 10, 6 << 20);
        Self {
            size: rng.random_range(1..=most / 512) * 512,
            cluster_bits,
            version,
            refcount_bits: if version == 2 { 16 } else { 1 << rng.random_range(0..=6) },
            extended_l2,
            data_file: version == 3 && !backing && rng.random_bool(0.15),
            zstd: version == 3 && rng.random_bool(0.3),
        }
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The options for headwater's `create`.
    pub(crate) fn create_options(
        &self,
        backing: Option<(String, Format)>,
        data_file: Option<&str>,
    ) -> CreateOptions {
        CreateOptions {
            cluster_size: self.cluster(),
            version: self.version,
            refcount_bits: self.refcount_bits,
            extended_l2: self.extended_l2,
            backing,
            data_file: data_file.map(str::to_owned),
            compression: if self.zstd { Compression::Zstd } else { Compression::Zlib },
            ..CreateOptions::new(self.size)
        }
    }

    /// Makes the image with qemu-img.
    pub(crate) fn create_with_qemu(
        &self,
        dir: &Path,
        image: &str,
        backing: Option<&(String, Format)>,
        data_file: Option<&str>,
    ) {
        let mut options = format!(
            "cluster_size={},compat={},refcount_bits={},extended_l2={}",
            self.cluster(),
            if self.version == 2 { "0.10" } else { "1.1" },
            self.refcount_bits,
            if self.extended_l2 { "on" } else { "off" }
        );
        if self.zstd {
            options += ",compression_type=zstd";
        }
        if let Some(data_file) = data_file {
            options += &format!(",data_file={data_file}");
        }
        let size = self.size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some((name, format)) = backing {
            args.extend(["-b", name, "-F", format.as_str()]);
        }
        args.extend([image, &size]);
        run(dir, "qemu-img", &args);
    }
}

/// Random commands for qemu-io that give an image of `size` bytes something to hold.
pub(crate) fn filling(rng: &mut StdRng, size: u64, cluster: u64, qcow2: bool) -> Vec<String> {
    let mut commands = Vec::new();
    // Compressed writes cover a cluster that nothing was written to, and come first therefore.
    for first in (0..size).step_by(cluster as usize).filter(|first| qcow2 && first + cluster <= size) {
        if rng.random_range(0..size) < 3 * cluster {
            commands.push(format!("write -c -P {} {first} {cluster}", rng.random_range(1..=255)));
        }
    }
    for _ in 0..rng.random_range(0..12) {
        let offset = rng.random_range(0..size);
        let len = rng.random_range(1..=cluster * 4).min(size - offset);
        let pattern = rng.random_range(1..=255);
        commands.push(match rng.random_range(0..10) {
            0..6 => format!("write -P {pattern} {offset} {len}"),
            6 => format!("write -z {offset} {len}"),
            7 => format!("write -z -u {offset} {len}"),
            _ => format!("discard {offset} {len}"),
        });
    }
    commands
}

/// Makes up to three images, each backed by the one before. Returns the last, and what a guest reads of it.
pub(crate) fn chain(rng: &mut StdRng, dir: &Path) -> Option<((String, Format), Vec<u8>)> {
    let mut top: Option<(String, Format)> = None;
    for depth in 0..rng.random_range(0..=3) {
        let geometry = Geometry { data_file: false, ..Geometry::random(rng, true) };
        let name = format!("base{depth}.img");
        let raw = depth == 0 && rng.random_bool(0.4);
        if raw {
            // Raw files may have any size.
            let size = geometry.size - rng.random_range(0..512);
            std::fs::File::create(dir.join(&name)).unwrap().set_len(size).unwrap();
            run_io_raw(rng, dir, &name, size);
            top = Some((name, Format::Raw));
        } else {
            geometry.create_with_qemu(dir, &name, top.as_ref(), None);
            qemu_io(dir, &name, &filling(rng, geometry.size, geometry.cluster(), true));
            top = Some((name, Format::Qcow2));
        }
    }
    let top = top?;
    let bytes = match top.1 {
        // QEMU rounds raw files up to sectors.
        Format::Raw => std::fs::read(dir.join(&top.0)).unwrap(),
        Format::Qcow2 => contents(dir, &top.0, None),
    };
    Some((top, bytes))
}

/// Fills a raw file without asking QEMU, which works in sectors there.
fn run_io_raw(rng: &mut StdRng, dir: &Path, name: &str, size: u64) {
    let mut bytes = vec![0; size as usize];
    for _ in 0..rng.random_range(0..8) {
        let start = rng.random_range(0..size) as usize;
        let end = bytes.len().min(start + rng.random_range(1..100_000));
        bytes[start..end].fill(rng.random_range(1..=255));
    }
    std::fs::write(dir.join(name), bytes).unwrap();
}
