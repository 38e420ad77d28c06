//! What there is to tell about an image and its chain. The names of fields are those of `qemu-img info --output=json`, so that programs
//! which read that can read this.

use crate::open::{Layer, OpenOptions, ProtocolOpener, walk};
use crate::open_gate::Location;
use crate::qcow2::header::{COMPAT_LAZY_REFCOUNTS, Header, INCOMPAT_CORRUPT, INCOMPAT_DIRTY};
use crate::qcow2::snapshots::{self, SnapshotInfo};
use headwater_block::{Error, Result};
use serde::Serialize;
use std::os::unix::fs::MetadataExt;

#[cfg(test)]
mod tests;

/// What a chain consists of.
#[derive(Debug)]
pub struct ChainInfo {
    /// The images that could be opened, the top first.
    pub images: Vec<ImageInfo>,
    /// Why the chain could not be followed to its end.
    pub failure: Option<Error>,
}

impl ChainInfo {
    /// What `qemu-img info --output=json` prints: of the top image, or with `chain` of all of them as an array.
    pub fn json(&self, chain: bool) -> Vec<u8> {
        let json = if chain {
            serde_json::to_vec_pretty(&self.images)
        } else {
            serde_json::to_vec_pretty(&self.images.first())
        };
        json.expect("these have names for keys and no floating point numbers")
    }
}

/// One image. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The path or URI.
    pub filename: String,
    /// The format's name.
    pub format: &'static str,
    /// The size that a guest sees.
    pub virtual_size: u64,
    /// The space that the file takes on its disk, if that can be known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// The cluster size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// The name of the backing file as the header spells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// Where that is, if the chain could be followed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The format of the backing file, if the header tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// The image was not closed cleanly.
    pub dirty_flag: bool,
    /// Internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// What only this format has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
}

/// What only one format has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum FormatSpecific {
    /// Of qcow2.
    Qcow2(Qcow2Info),
}

/// What only qcow2 has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// "0.10" (version 2) or "1.1" (version 3).
    pub compat: &'static str,
    /// How compressed clusters are compressed.
    pub compression_type: &'static str,
    /// The width of reference counts in bits.
    pub refcount_bits: u32,
    /// Reference counts are written lazily. Version 3 only, as all that follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// The image is known to be damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Clusters are allocated in subclusters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
    /// The name of the file that holds the guest's data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// That file is a raw image by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
}

/// Looks at the image that the operator calls `name`, and at its chain as far as it can be followed. Opens for reading only.
///
/// Fails if the top image can't be opened.
pub async fn chain_info(name: &str, options: &OpenOptions, opener: &dyn ProtocolOpener) -> Result<ChainInfo> {
    let options = OpenOptions { read_only: true, ..options.clone() };
    let (layers, failure) = walk(name, &options, opener).await;
    match failure {
        Some(err) if layers.is_empty() => return Err(err),
        _ => {}
    }
    let mut images = Vec::new();
    for (i, layer) in layers.iter().enumerate() {
        images.push(ImageInfo::of(layer, layers.get(i + 1)).await?);
    }
    Ok(ChainInfo { images, failure })
}

impl ImageInfo {
    /// What there is to tell about `layer`, under which `below` was found.
    async fn of(layer: &Layer, below: Option<&Layer>) -> Result<Self> {
        let mut info = Self {
            filename: layer.name(),
            format: layer.format.as_str(),
            virtual_size: layer.file.size(),
            actual_size: actual_size(&layer.location),
            cluster_size: None,
            backing_filename: None,
            full_backing_filename: None,
            backing_filename_format: None,
            dirty_flag: false,
            snapshots: Vec::new(),
            format_specific: None,
        };
        if let Some(header) = &layer.header {
            info.virtual_size = header.size;
            info.cluster_size = Some(header.cluster_size());
            info.backing_filename = header.backing_name.clone();
            info.full_backing_filename = below.map(Layer::name);
            info.backing_filename_format = header.backing_format();
            info.dirty_flag = header.incompatible & INCOMPAT_DIRTY != 0;
            info.snapshots = snapshots::list(&*layer.file, header).await?;
            info.format_specific = Some(FormatSpecific::Qcow2(Qcow2Info::of(header)));
        }
        Ok(info)
    }
}

impl Qcow2Info {
    fn of(header: &Header) -> Self {
        let v3 = header.version >= 3;
        Self {
            compat: if v3 { "1.1" } else { "0.10" },
            compression_type: header.compression.as_str(),
            refcount_bits: 1 << header.refcount_order,
            lazy_refcounts: v3.then_some(header.compatible & COMPAT_LAZY_REFCOUNTS != 0),
            corrupt: v3.then_some(header.incompatible & INCOMPAT_CORRUPT != 0),
            extended_l2: v3.then(|| header.has_extended_l2()),
            data_file: header.data_file_name().filter(|_| header.has_data_file()),
            data_file_raw: header.has_data_file().then(|| header.data_file_is_raw()),
        }
    }
}

/// The space that a local file takes.
fn actual_size(location: &Location) -> Option<u64> {
    /// The unit of `st_blocks`, in bytes, whatever the file system's block size.
    const BLOCK: u64 = 512;
    let Location::Path(path) = location else { return None };
    std::fs::metadata(path).ok().map(|metadata| metadata.blocks() * BLOCK)
}
