//! The header: the first sector of an image, and what follows it in the first cluster.
//!
//! Nothing that it says is believed before it is checked here: sizes are bounded, offsets aligned, features known.

use super::entry::Geometry;
use super::extensions::{self, Extension, FeatureKind};
use headwater_block::{BufferMut, Error, ErrorKind, Node, Result};
use zerocopy::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

#[cfg(test)]
mod tests;

/// The first four bytes of an image.
pub const MAGIC: u32 = 0x5146_49fb;

/// Incompatible feature: refcounts may be wrong.
pub const INCOMPAT_DIRTY: u64 = 1 << 0;
/// Incompatible feature: the image is known to be damaged.
pub const INCOMPAT_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data are in another file.
pub const INCOMPAT_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: compressed clusters aren't zlib.
pub const INCOMPAT_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries of 16 bytes, with subclusters.
pub const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;
/// Compatible feature: refcounts are written lazily.
pub const COMPAT_LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature: the bitmaps extension is consistent with the data.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear feature: the external data file is a valid raw image by itself.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;

const KNOWN_INCOMPAT: u64 =
    INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_DATA_FILE | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2;

/// The largest active L1 table, in bytes.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The largest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The largest number of internal snapshots.
pub const MAX_SNAPSHOTS: u32 = 65536;
/// The longest name of a backing file, in bytes.
pub const MAX_BACKING_NAME: usize = 1023;

/// The lengths in bytes of the header of version 2, of the shortest of version 3, and of the longest that is known here.
const V2_LEN: usize = 72;
const V3_MIN_LEN: usize = 104;
const KNOWN_LEN: usize = 112;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Default)]
#[repr(C)]
struct Raw {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    incompatible: U64,
    compatible: U64,
    autoclear: U64,
    refcount_order: U32,
    header_length: U32,
    compression_type: u8,
    padding: [u8; 7],
}

/// How compressed clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate with a window of 4 KiB.
    Zlib,
    /// One zstd frame.
    Zstd,
}

impl Compression {
    /// The name that tools use.
    pub fn as_str(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// Where in the first cluster something lies, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// Its first byte.
    pub offset: usize,
    /// Its length.
    pub len: usize,
}

impl Place {
    /// The offset after its last byte.
    pub fn end(self) -> usize {
        self.offset + self.len
    }
}

/// A checked header, with its extensions and the name of the backing file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size as a power of two, 9 to 21.
    pub cluster_bits: u32,
    /// The size of the disk in bytes.
    pub size: u64,
    /// The number of entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table lies in the file, in bytes.
    pub l1_table_offset: u64,
    /// Where the refcount table lies in the file, in bytes.
    pub refcount_table_offset: u64,
    /// How many clusters the refcount table has.
    pub refcount_table_clusters: u32,
    /// How many internal snapshots there are.
    pub nb_snapshots: u32,
    /// Where the snapshot table lies in the file, in bytes.
    pub snapshots_offset: u64,
    /// The incompatible feature bits; see the constants.
    pub incompatible: u64,
    /// The compatible feature bits.
    pub compatible: u64,
    /// The autoclear feature bits.
    pub autoclear: u64,
    /// The width in bits of refcounts as a power of two, 0 to 6.
    pub refcount_order: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The length in bytes of the header proper: where extensions start.
    pub header_length: usize,
    /// Header fields that are not known here, kept as they are.
    pub unknown_fields: Vec<u8>,
    /// The extensions in their order, unknown ones included.
    pub extensions: Vec<Extension>,
    /// The name of the backing file as the header spells it.
    pub backing_name: Option<String>,
    /// Where the name of the backing file lies.
    pub backing_place: Place,
    /// Where the extensions end in the first cluster, in bytes.
    pub extensions_end: usize,
}

impl Header {
    /// Reads and checks the header of the image in `file`.
    pub async fn read(file: &dyn Node) -> Result<Self> {
        Ok(Self::read_with_cluster(file).await?.0)
    }

    /// As [`Header::read`]; also returns the first cluster.
    pub async fn read_with_cluster(file: &dyn Node) -> Result<(Self, Vec<u8>)> {
        let sector = file.read(0, BufferMut::new(512)).await?;
        let cluster_bits = check_start(&sector, file.name())?;
        let cluster = file.read(0, BufferMut::new(1 << cluster_bits)).await?;
        Ok((Self::parse(&cluster, file.name())?, cluster.to_vec()))
    }

    /// Checks and decodes the first cluster of the image `name`. May be given less than a cluster if the rest is zero.
    pub fn parse(cluster: &[u8], name: &str) -> Result<Self> {
        let cluster_bits = check_start(cluster, name)?;
        let cluster_size = 1usize << cluster_bits;
        let corrupt = |message: String| {
            Error::new(
                ErrorKind::Corrupt,
                format!("{name}: {message}; the header is damaged, restore it from a copy"),
            )
        };
        let mut raw = Raw::default();
        let known = cluster.len().min(KNOWN_LEN);
        raw.as_mut_bytes()[..known].copy_from_slice(&cluster[..known]);
        let v3 = raw.version.get() >= 3;
        let header_length = if v3 { raw.header_length.get() as usize } else { V2_LEN };
        if v3 && (header_length < V3_MIN_LEN || header_length > cluster_size || header_length % 8 != 0) {
            return Err(corrupt(format!(
                "header length {header_length} is not a multiple of 8 from {V3_MIN_LEN} to the cluster size {cluster_size}"
            )));
        }
        // Fields beyond the header's length are absent, which means the same as zero.
        raw.as_mut_bytes()[header_length.min(KNOWN_LEN)..].fill(0);
        if !v3 {
            raw.refcount_order = U32::new(4);
        }

        let backing_offset = raw.backing_file_offset.get();
        let backing_len = raw.backing_file_size.get() as usize;
        let extensions_limit = if backing_offset == 0 {
            cluster_size
        } else {
            let fits = usize::try_from(backing_offset).ok().filter(|start| {
                *start >= header_length && backing_len <= cluster_size.saturating_sub(*start)
            });
            match fits {
                Some(start) if backing_len <= MAX_BACKING_NAME => start,
                _ => {
                    return Err(corrupt(format!(
                        "the backing file's name ({backing_len} bytes at offset {backing_offset}) is not within the first cluster of \
                         {cluster_size} bytes, or longer than {MAX_BACKING_NAME}"
                    )));
                }
            }
        };
        let (extensions, extensions_end) = extensions::parse(cluster, header_length, extensions_limit, name)?;
        check_features(&raw, &extensions, name)?;

        let backing_place = Place { offset: backing_offset as usize, len: backing_len };
        let backing_name = if backing_offset == 0 || backing_len == 0 {
            None
        } else {
            let bytes = cluster.get(backing_place.offset..backing_place.end()).unwrap_or_default();
            let text = std::str::from_utf8(bytes)
                .ok()
                .filter(|text| !text.is_empty() && !text.contains('\0'))
                .ok_or_else(|| corrupt("the backing file's name is not UTF-8 text".into()))?;
            Some(text.to_owned())
        };
        // What isn't given of them is zero.
        let mut unknown_fields =
            cluster.get(KNOWN_LEN..header_length.min(cluster.len())).unwrap_or_default().to_vec();
        unknown_fields.resize(header_length.saturating_sub(KNOWN_LEN), 0);
        let compression = match (raw.incompatible.get() & INCOMPAT_COMPRESSION != 0, raw.compression_type) {
            (false, 0) => Compression::Zlib,
            (true, 1) => Compression::Zstd,
            (_, kind) if kind > 1 => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{name}: compression type {kind} is unknown; zlib (0) and zstd (1) can be read"),
                ));
            }
            (_, kind) => {
                return Err(corrupt(format!(
                    "compression type {kind} contradicts the compression feature bit"
                )));
            }
        };
        let header = Self {
            version: raw.version.get(),
            cluster_bits,
            size: raw.size.get(),
            l1_size: raw.l1_size.get(),
            l1_table_offset: raw.l1_table_offset.get(),
            refcount_table_offset: raw.refcount_table_offset.get(),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            nb_snapshots: raw.nb_snapshots.get(),
            snapshots_offset: raw.snapshots_offset.get(),
            incompatible: raw.incompatible.get(),
            compatible: raw.compatible.get(),
            autoclear: raw.autoclear.get(),
            refcount_order: raw.refcount_order.get(),
            compression,
            header_length,
            unknown_fields,
            extensions,
            backing_name,
            backing_place,
            extensions_end,
        };
        header.check_tables().map_err(corrupt)?;
        Ok(header)
    }

    /// Checks what can be checked of sizes and offsets without reading any table.
    fn check_tables(&self) -> std::result::Result<(), String> {
        if self.refcount_order > 6 {
            return Err(format!("refcount order {} is above 6 (64 bits)", self.refcount_order));
        }
        let geometry = Geometry::of(self);
        if self.has_extended_l2() && self.cluster_bits < 14 {
            return Err(format!(
                "subclusters need clusters of 16 KiB or more, these have {} bytes",
                geometry.cluster_size()
            ));
        }
        let l1_bytes = u64::from(self.l1_size) * 8;
        let refcount_bytes = u64::from(self.refcount_table_clusters) * geometry.cluster_size();
        if l1_bytes > MAX_L1_BYTES {
            return Err(format!("the L1 table of {l1_bytes} bytes is larger than {MAX_L1_BYTES}"));
        }
        if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(format!(
                "the refcount table has {refcount_bytes} bytes, must have 1 to {MAX_REFCOUNT_TABLE_BYTES}"
            ));
        }
        if self.nb_snapshots > MAX_SNAPSHOTS {
            return Err(format!("{} snapshots are more than {MAX_SNAPSHOTS}", self.nb_snapshots));
        }
        if geometry.l1_entries_for(self.size) > u64::from(self.l1_size) {
            return Err(format!(
                "a disk of {} bytes doesn't fit an L1 table of {} entries",
                self.size, self.l1_size
            ));
        }
        for (what, offset, len, used) in [
            ("L1 table", self.l1_table_offset, l1_bytes, self.l1_size > 0),
            ("refcount table", self.refcount_table_offset, refcount_bytes, true),
            ("snapshot table", self.snapshots_offset, 0, self.nb_snapshots > 0),
        ] {
            let in_range = offset.checked_add(len).is_some_and(|end| end <= i64::MAX as u64);
            if used && (offset == 0 || offset % geometry.cluster_size() != 0 || !in_range) {
                return Err(format!(
                    "the {what} at offset {offset:#x} is not at a cluster boundary within the file"
                ));
            }
        }
        Ok(())
    }

    /// The cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// True if L2 entries have subclusters.
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible & INCOMPAT_EXTENDED_L2 != 0
    }

    /// True if guest data are in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPAT_DATA_FILE != 0
    }

    /// True if that other file is by itself a raw image of the disk, and must stay one.
    pub fn data_file_is_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    /// The name of the external data file, if the header has one.
    pub fn data_file_name(&self) -> Option<String> {
        extensions::find(&self.extensions, extensions::DATA_FILE)
            .map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// The format of the backing file, if the header tells.
    pub fn backing_format(&self) -> Option<String> {
        extensions::find(&self.extensions, extensions::BACKING_FORMAT)
            .map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// The header proper, without extensions: [`Header::header_length`] bytes.
    pub fn encode_fixed(&self) -> Vec<u8> {
        let raw = Raw {
            magic: U32::new(MAGIC),
            version: U32::new(self.version),
            backing_file_offset: U64::new(self.backing_place.offset as u64),
            backing_file_size: U32::new(self.backing_place.len as u32),
            cluster_bits: U32::new(self.cluster_bits),
            size: U64::new(self.size),
            crypt_method: U32::new(0),
            l1_size: U32::new(self.l1_size),
            l1_table_offset: U64::new(self.l1_table_offset),
            refcount_table_offset: U64::new(self.refcount_table_offset),
            refcount_table_clusters: U32::new(self.refcount_table_clusters),
            nb_snapshots: U32::new(self.nb_snapshots),
            snapshots_offset: U64::new(self.snapshots_offset),
            incompatible: U64::new(self.incompatible),
            compatible: U64::new(self.compatible),
            autoclear: U64::new(self.autoclear),
            refcount_order: U32::new(self.refcount_order),
            header_length: U32::new(self.header_length as u32),
            compression_type: u8::from(self.compression == Compression::Zstd),
            padding: [0; 7],
        };
        let mut bytes = raw.as_bytes().to_vec();
        bytes.extend_from_slice(&self.unknown_fields);
        bytes.truncate(self.header_length);
        bytes
    }

    /// The header, its extensions and the backing file's name, laid out afresh one after the other: what a new image starts with.
    /// Sets [`Header::backing_place`] and [`Header::extensions_end`]. Fails if that is more than a cluster.
    pub fn encode(&mut self) -> Result<Vec<u8>> {
        let list = extensions::encode(&self.extensions);
        self.extensions_end = self.header_length + list.len();
        let name = self.backing_name.as_deref().unwrap_or_default();
        let offset = if name.is_empty() { 0 } else { self.extensions_end };
        self.backing_place = Place { offset, len: name.len() };
        let mut bytes = self.encode_fixed();
        bytes.extend_from_slice(&list);
        bytes.extend_from_slice(name.as_bytes());
        if bytes.len() as u64 > self.cluster_size() || name.len() > MAX_BACKING_NAME {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "the header with the backing file's name ({} bytes) doesn't fit in the first cluster ({} bytes, names at most \
                     {MAX_BACKING_NAME}); choose larger clusters or a shorter name",
                    name.len(),
                    self.cluster_size()
                ),
            ));
        }
        Ok(bytes)
    }

    /// The usual header length in bytes for a version: what new images get.
    pub fn default_length(version: u32) -> usize {
        if version < 3 { V2_LEN } else { KNOWN_LEN }
    }
}

/// Checks what must hold before anything else is looked at, and returns `cluster_bits`.
fn check_start(bytes: &[u8], name: &str) -> Result<u32> {
    let word = |at: usize| {
        bytes.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]])).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("{name}: a file of {} bytes is too short for a qcow2 header", bytes.len()),
            )
        })
    };
    let (magic, version, crypt, cluster_bits) = (word(0)?, word(4)?, word(32)?, word(20)?);
    word(V2_LEN - 4)?;
    if magic != MAGIC {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "{name}: not a qcow2 image (it starts with {magic:#010x}, not {MAGIC:#010x}); is it raw?"
            ),
        ));
    }
    if !(2..=3).contains(&version) {
        let text = format!("{name}: qcow2 version {version} is not supported; versions 2 and 3 are");
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    if crypt != 0 {
        let text = format!(
            "{name}: the image is encrypted (method {crypt}), which is not supported; convert it to an unencrypted image first"
        );
        return Err(Error::new(ErrorKind::Unsupported, text));
    }
    if !(9..=21).contains(&cluster_bits) {
        let text = format!(
            "{name}: clusters of 2^{cluster_bits} bytes; 2^9 to 2^21 are possible; the header is damaged, restore it from a copy"
        );
        return Err(Error::new(ErrorKind::Corrupt, text));
    }
    Ok(cluster_bits)
}

/// Refuses incompatible features that are not known, by their names.
fn check_features(raw: &Raw, list: &[Extension], name: &str) -> Result<()> {
    let unknown = raw.incompatible.get() & !KNOWN_INCOMPAT;
    if unknown == 0 {
        return Ok(());
    }
    let names: Vec<String> = (0..64)
        .filter(|bit| unknown >> bit & 1 == 1)
        .map(|bit| match extensions::feature_name(list, FeatureKind::Incompatible, bit) {
            Some(text) => format!("'{text}' (bit {bit})"),
            None => format!("bit {bit} (the image doesn't name it)"),
        })
        .collect();
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "{name}: the image uses incompatible features that headwater doesn't know: {}; open it with the program that made it, and \
             convert it",
            names.join(", ")
        ),
    ))
}
