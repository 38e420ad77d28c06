//! Which format a file has, judged by its first bytes.
//!
//! A raw disk may begin with anything, so raw is what remains when nothing else is recognised; formats that headwater knows of but
//! can't read are refused by name, because reading them as raw would hand their metadata to a guest.

use headwater_block::{Error, ErrorKind, Result};
use std::fmt;

/// How many bytes from the start of a file [`probe`] wants to see; fewer if the file is shorter.
pub const PROBE_LEN: usize = 512;

/// The image formats that can be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// The bytes are the disk.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The name as image headers and command lines spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// The format that `name` means; `object` is the one that the error names.
    pub fn from_name(name: &str, object: &str) -> Result<Self> {
        match name {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{object}: the format '{name}' is not supported (raw and qcow2 are); convert the image to one of them, for example \
                     with qemu-img convert"
                ),
            )),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What gives a foreign format away: the bytes `magic` at `offset`.
struct Foreign {
    offset: usize,
    magic: &'static [u8],
    name: &'static str,
    remedy: &'static str,
}

const CONVERT: &str = "convert it first, for example with qemu-img convert -O qcow2";
const UNPACK: &str = "unpack it first";

const FOREIGN: &[Foreign] = &[
    Foreign { offset: 0, magic: b"QFI\xfb\0\0\0\x01", name: "a qcow (version 1) image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"QED\0", name: "a QED image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"KDMV", name: "a VMDK image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"COWD", name: "a VMDK image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"# Disk DescriptorFile", name: "a VMDK descriptor", remedy: CONVERT },
    Foreign { offset: 0, magic: b"vhdxfile", name: "a VHDX image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"conectix", name: "a VHD (VPC) image", remedy: CONVERT },
    Foreign { offset: 64, magic: b"\x7f\x10\xda\xbe", name: "a VDI image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"WithoutFreeSpace", name: "a Parallels image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"WithouFreSpacExt", name: "a Parallels image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"Bochs Virtual HD Image", name: "a Bochs image", remedy: CONVERT },
    Foreign { offset: 0, magic: b"LUKS\xba\xbe", name: "a LUKS-encrypted image", remedy: "decrypt it first" },
    Foreign { offset: 0, magic: b"\xfd7zXZ\0", name: "an xz-compressed file", remedy: UNPACK },
    Foreign { offset: 0, magic: b"\x1f\x8b\x08", name: "a gzip-compressed file", remedy: UNPACK },
    Foreign { offset: 0, magic: b"\x28\xb5\x2f\xfd", name: "a zstd-compressed file", remedy: UNPACK },
];

/// The format of the file `object` that begins with `head` (its first [`PROBE_LEN`] bytes).
///
/// Fails with `Unsupported` if it is of a known format that can't be read.
pub fn probe(head: &[u8], object: &str) -> Result<Format> {
    let found = FOREIGN
        .iter()
        .find(|foreign| head.get(foreign.offset..).is_some_and(|bytes| bytes.starts_with(foreign.magic)));
    if let Some(Foreign { name, remedy, .. }) = found {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{object}: this looks like {name}, which is not supported: {remedy}, or name the format raw explicitly if the disk's own \
                 bytes are meant"
            ),
        ));
    }
    Ok(if head.starts_with(b"QFI\xfb") { Format::Qcow2 } else { Format::Raw })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_bytes_are_raw_and_foreign_formats_are_refused_by_name() {
        assert_eq!(probe(b"", "d").unwrap(), Format::Raw);
        assert_eq!(probe(&[0; PROBE_LEN], "d").unwrap(), Format::Raw);
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03", "d").unwrap(), Format::Qcow2);
        assert_eq!(probe(b"QFI\xfb\0\0\0\x02", "d").unwrap(), Format::Qcow2);
        for foreign in FOREIGN {
            let mut head = vec![0; PROBE_LEN];
            head[foreign.offset..][..foreign.magic.len()].copy_from_slice(foreign.magic);
            let err = probe(&head, "disk.img").unwrap_err();
            assert_eq!(err.kind(), ErrorKind::Unsupported);
            let text = err.to_string();
            assert!(
                text.starts_with("disk.img: ")
                    && text.contains(foreign.name)
                    && text.contains("raw explicitly"),
                "{text}"
            );
        }
    }

    #[test]
    fn format_names_are_those_of_image_headers() {
        for format in [Format::Raw, Format::Qcow2] {
            assert_eq!(Format::from_name(format.as_str(), "d").unwrap(), format);
        }
        let err = Format::from_name("vmdk", "disk.vmdk").unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Unsupported);
        assert!(err.to_string().contains("disk.vmdk") && err.to_string().contains("'vmdk'"));
    }
}
