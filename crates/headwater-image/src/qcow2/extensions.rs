//! Header extensions: typed records between the header and the name of the backing file.

use headwater_block::{Error, ErrorKind, Result};

/// The type that ends the list.
const END: u32 = 0;
/// The format name of the backing file.
pub const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits, for messages.
pub const FEATURE_NAMES: u32 = 0x6803_f857;
/// The directory of persistent bitmaps.
pub const BITMAPS: u32 = 0x2385_2875;
/// Where the LUKS header lies.
pub const LUKS: u32 = 0x0537_be77;
/// The name of the external data file.
pub const DATA_FILE: u32 = 0x4441_5441;

/// The size in bytes of one entry of the feature name table: type, bit, name.
const FEATURE_NAME_LEN: usize = 48;

/// One header extension, as found. Those of unknown types are kept as they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extension {
    /// What it is; one of this module's constants, or unknown.
    pub kind: u32,
    /// Its bytes, without padding.
    pub data: Vec<u8>,
}

impl Extension {
    /// Its length in bytes in the header, with its own header and padding.
    pub fn encoded_len(&self) -> usize {
        8 + self.data.len().next_multiple_of(8)
    }
}

/// Which kind of feature a bit belongs to, numbered as in the feature name table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureKind {
    /// Who doesn't know it must not open the image.
    Incompatible = 0,
    /// Who doesn't know it may ignore it.
    Compatible = 1,
    /// Who doesn't know it clears it when writing.
    Autoclear = 2,
}

/// Reads the list that starts at `start` of the first cluster and must end before `end`. Returns it and the offset after its end mark.
/// `name` is the image's.
pub fn parse(cluster: &[u8], start: usize, end: usize, name: &str) -> Result<(Vec<Extension>, usize)> {
    let area = cluster.get(..end).unwrap_or(cluster);
    let mut list = Vec::new();
    let mut at = start;
    loop {
        let Some(head) = area.get(at..at + 8) else { return Ok((list, at.min(area.len()))) };
        let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        let len = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        at += 8;
        if kind == END {
            return Ok((list, at));
        }
        let data = len.checked_add(at).and_then(|data_end| area.get(at..data_end)).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!(
                    "{name}: the header extension of type {kind:#010x} at offset {} claims {len} bytes, but the area of extensions ends \
                     at {}; the header is damaged, restore it from a copy",
                    at - 8,
                    area.len()
                ),
            )
        })?;
        list.push(Extension { kind, data: data.to_vec() });
        at = (at + len).next_multiple_of(8);
    }
}

/// The bytes of the list, with its end mark.
pub fn encode(list: &[Extension]) -> Vec<u8> {
    let mut out = Vec::with_capacity(list.iter().map(Extension::encoded_len).sum::<usize>() + 8);
    for extension in list {
        out.extend_from_slice(&extension.kind.to_be_bytes());
        out.extend_from_slice(&(extension.data.len() as u32).to_be_bytes());
        out.extend_from_slice(&extension.data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend_from_slice(&[0; 8]);
    out
}

/// The data of the first extension of `kind`.
pub fn find(list: &[Extension], kind: u32) -> Option<&[u8]> {
    list.iter().find(|extension| extension.kind == kind).map(|extension| extension.data.as_slice())
}

/// What the image's own feature name table calls bit `bit`.
pub fn feature_name(list: &[Extension], kind: FeatureKind, bit: u32) -> Option<String> {
    find(list, FEATURE_NAMES)?.chunks_exact(FEATURE_NAME_LEN).find_map(|entry| {
        let found = entry[0] == kind as u8 && u32::from(entry[1]) == bit;
        let text = entry[2..].split(|byte| *byte == 0).next().unwrap_or_default();
        found.then(|| String::from_utf8_lossy(text).into_owned()).filter(|text| !text.is_empty())
    })
}

/// A feature name table with the bits that headwater knows.
pub fn feature_name_table() -> Extension {
    use FeatureKind::*;
    const NAMES: [(FeatureKind, u8, &str); 8] = [
        (Incompatible, 0, "dirty bit"),
        (Incompatible, 1, "corrupt bit"),
        (Incompatible, 2, "external data file"),
        (Incompatible, 3, "compression type"),
        (Incompatible, 4, "extended L2 entries"),
        (Compatible, 0, "lazy refcounts"),
        (Autoclear, 0, "bitmaps"),
        (Autoclear, 1, "raw external data"),
    ];
    let mut data = Vec::with_capacity(NAMES.len() * FEATURE_NAME_LEN);
    for (kind, bit, text) in NAMES {
        let end = data.len() + FEATURE_NAME_LEN;
        data.extend_from_slice(&[kind as u8, bit]);
        data.extend_from_slice(text.as_bytes());
        data.resize(end, 0);
    }
    Extension { kind: FEATURE_NAMES, data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_survives_encoding_and_its_lengths_are_checked() {
        let list = vec![
            Extension { kind: BACKING_FORMAT, data: b"raw".to_vec() },
            Extension { kind: 0x1234_5678, data: vec![7; 16] },
            feature_name_table(),
        ];
        let bytes = encode(&list);
        let (parsed, end) = parse(&bytes, 0, bytes.len(), "t").unwrap();
        assert_eq!((parsed, end), (list.clone(), bytes.len()));
        assert_eq!(feature_name(&list, FeatureKind::Compatible, 0).as_deref(), Some("lazy refcounts"));
        assert_eq!(feature_name(&list, FeatureKind::Compatible, 9), None);
        // Every truncation either ends the list early or is refused; none panics.
        for end in 0..bytes.len() {
            let _ = parse(&bytes, 0, end, "t");
            let _ = parse(&bytes[..end], end, bytes.len(), "t");
        }
        let mut lying = bytes;
        lying[4..8].copy_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(parse(&lying, 0, lying.len(), "t").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
