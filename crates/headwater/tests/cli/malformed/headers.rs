//! Headers that lie, and files that are something else.

use super::case::{Case, Expected};
use super::image::{BITMAPS, CLUSTER, DATA, END, Image, L1, L2, MORE_DATA, at};

pub(super) fn cut_short() -> Vec<Case> {
    let cut = |len: u64, says: &'static str| {
        let case = Case::refused(format!("cut to {len} bytes"), says, |image| {
            image.resize(len);
        });
        case.in_format("qcow2")
    };
    let mut cases =
        vec![cut(0, "not a qcow2"), cut(4, "version"), cut(71, "header"), cut(103, "header length")];
    for (what, len, says) in [
        ("refcount table", 512, "past the end"),
        ("L1 table", L1, "past the end"),
        ("L2 table", L2, "past the end"),
        ("data", DATA, "past the end"),
        ("last data", MORE_DATA, "past the end"),
    ] {
        cases.push(Case::damaged(format!("cut before the {what}"), says, |image| {
            image.resize(len);
        }));
    }
    cases
}

pub(super) fn headers() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut refused = |name: String, says: &str, damage: &dyn Fn(&mut Image)| {
        cases.push(Case::refused(name, says, |image| damage(image)));
    };
    for version in [0, 1, 4, u32::MAX] {
        refused(format!("version {version}"), "version", &|image| {
            image.put32(at::VERSION, version);
        });
    }
    for bits in [0, 8, 22, 32, 64, u32::MAX] {
        refused(format!("clusters of 2^{bits} bytes"), "cluster", &|image| {
            image.put32(at::CLUSTER_BITS, bits);
        });
    }
    for size in [1 << 50, i64::MAX as u64, u64::MAX - 511, u64::MAX] {
        refused(format!("disk of {size} bytes"), "L1 table", &|image| {
            image.put64(at::SIZE, size);
        });
    }
    for method in [1, 2, u32::MAX] {
        refused(format!("encryption {method}"), "encrypted", &|image| {
            image.put32(at::ENCRYPTION, method);
        });
    }
    for offset in [0, 1, 512, 1 << 63, u64::MAX - 65535] {
        refused(format!("L1 table at {offset:#x}"), "L1 table", &|image| {
            image.put64(at::L1, offset);
        });
        refused(format!("refcount table at {offset:#x}"), "refcount table", &|image| {
            image.put64(at::REFTABLE, offset);
        });
    }
    refused("gigantic L1 table".into(), "L1 table", &|image| {
        image.put32(at::L1_SIZE, u32::MAX);
    });
    for clusters in [0, 129, u32::MAX] {
        refused(format!("refcount table of {clusters} clusters"), "refcount table", &|image| {
            image.put32(at::REFTABLE_CLUSTERS, clusters);
        });
    }
    refused("snapshots without number".into(), "snapshots", &|image| {
        image.put32(at::SNAPSHOTS, u32::MAX);
    });
    for offset in [0, 8, 1 << 63] {
        refused(format!("snapshot table at {offset:#x}"), "snapshot table", &|image| {
            image.put32(at::SNAPSHOTS, 1).put64(at::SNAPSHOT_TABLE, offset);
        });
    }
    refused("reference counts of 128 bits".into(), "refcount", &|image| {
        image.put32(at::REFCOUNT_ORDER, 7);
    });
    for len in [0, 103, 105, 1 << 17, u32::MAX] {
        refused(format!("header of {len} bytes"), "header length", &|image| {
            image.put32(at::HEADER_LEN, len);
        });
    }
    refused("unknown feature".into(), "bit 40", &|image| {
        image.put64(at::INCOMPATIBLE, 1 << 40);
    });
    refused("unknown feature with a name that is none".into(), "bit 40", &|image| {
        let mut names = vec![0, 40];
        names.extend([0xff; 46]);
        image.put64(at::INCOMPATIBLE, 1 << 40).extend(0x6803_f857, &names);
    });
    refused("unknown compression".into(), "compression", &|image| {
        image.put64(at::INCOMPATIBLE, 1 << 3).put(at::COMPRESSION, &[200]);
    });
    refused("compression without its feature".into(), "compression", &|image| {
        image.put(at::COMPRESSION, &[1]);
    });
    refused("subclusters in clusters of 4 KiB".into(), "subclusters", &|image| {
        image.put64(at::INCOMPATIBLE, 1 << 4).put32(at::CLUSTER_BITS, 12);
    });
    refused("extension without an end".into(), "extension", &|image| {
        image.put32(at::EXTENSIONS, 0x1234).put32(at::EXTENSIONS + 4, u32::MAX);
    });
    refused("extension over the backing file's name".into(), "extension", &|image| {
        image.backing("beside.raw", "raw").extend(0x1234, &[1; 5000]).put(4096, b"beside.raw");
    });
    for (what, offset, len) in [
        ("behind the header cluster", CLUSTER, 4),
        ("far away", 1 << 60, 4),
        ("over the end of the header cluster", CLUSTER - 2, 4),
        ("in the header", 8, 4),
        ("without an end", 4096, u32::MAX),
        ("of 1024 bytes", 4096, 1024),
    ] {
        refused(format!("backing file's name {what}"), "backing file", &|image| {
            image.put64(at::BACKING, offset).put32(at::BACKING_LEN, len);
        });
    }
    for name in [&b"\xff\xfe\x00\x01"[..], b"x\0/etc/passwd"] {
        refused(format!("backing file's name {name:?}"), "UTF-8", &|image| {
            image.put64(at::BACKING, 4096).put32(at::BACKING_LEN, name.len() as u32).put(4096, name);
        });
    }
    let case = Case::damaged("L1 table that is mostly not there", "past the end", |image| {
        image.put32(at::L1_SIZE, (32 << 20) / 8);
    });
    cases.push(case);
    cases
}

/// Things that aren't qcow2, as the image and below it.
pub(super) fn formats() -> Vec<Case> {
    let mut vdi = vec![0; 512];
    vdi[64..68].copy_from_slice(b"\x7f\x10\xda\xbe");
    let foreign: [(&str, &[u8], &str); 14] = [
        ("qcow of version 1", b"QFI\xfb\0\0\0\x01", "qcow"),
        ("QED", b"QED\0\0\0\x01\0", "QED"),
        ("VMDK", b"KDMV\x01\0\0\0", "VMDK"),
        ("VMDK of ESX", b"COWD\x01\0\0\0", "VMDK"),
        ("VMDK descriptor", b"# Disk DescriptorFile\nversion=1\nRW 2048 FLAT \"/etc/passwd\" 0\n", "VMDK"),
        ("VHDX", b"vhdxfile", "VHDX"),
        ("VHD", b"conectix", "VHD"),
        ("VDI", &vdi, "VDI"),
        ("Parallels", b"WithoutFreeSpace", "Parallels"),
        ("Bochs", b"Bochs Virtual HD Image", "Bochs"),
        ("LUKS", b"LUKS\xba\xbe\0\x01", "LUKS"),
        ("xz", b"\xfd7zXZ\0", "xz"),
        ("gzip", b"\x1f\x8b\x08\0", "gzip"),
        ("zstd", b"\x28\xb5\x2f\xfd", "zstd"),
    ];
    let mut cases = Vec::new();
    for (what, magic, says) in foreign {
        let mut image = Image::of(magic);
        image.resize(CLUSTER);
        let mut case = Case::refused(what, says, |_| ());
        case.image = Image::of(magic);
        case.image.resize(CLUSTER);
        cases.push(case);
        let case = Case::chain(format!("backing of no format that is {what}"), says, |image| {
            image.backing("other", "");
        });
        cases.push(case.beside("other", &image));
    }
    cases
}

/// Bitmaps and their directory.
pub(super) fn bitmaps() -> Vec<Case> {
    let header = |bitmaps: u32, len: u64, offset: u64| {
        [&bitmaps.to_be_bytes()[..], &[0; 4], &len.to_be_bytes(), &offset.to_be_bytes()].concat()
    };
    let entry = |table: u64, size: u32, flags: u32, kind: u8, granularity: u8, name: &str| {
        let mut bytes = [&table.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
        bytes.extend([kind, granularity]);
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    };
    let mut cases = Vec::new();
    let mut damaged = |what: &str, says: &str, extension: Vec<u8>, directory: Vec<u8>| {
        cases.push(Case::damaged(format!("bitmaps: {what}"), says, |image| {
            image.put64(at::AUTOCLEAR, 1).extend(BITMAPS, &extension);
            image.put(END, &directory).put64(END + CLUSTER, 0).resize(END + 3 * CLUSTER).count(7..10, 1);
        }));
    };
    let table = END + CLUSTER;
    let sound = entry(table, 1, 2, 1, 16, "b");
    let one = header(1, 32, END);
    damaged("directory past the end", "past the end", header(1, 32, 1 << 50), sound.clone());
    damaged("directory in the header", "same place", header(1, 32, 0), sound.clone());
    damaged("directory without an end", "64 MiB", header(1, u64::MAX, END), sound.clone());
    damaged("directory that is too short", "ends within", header(1, 16, END), sound.clone());
    damaged("more than there may be", "more than 65535", header(u32::MAX, 32, END), sound);
    damaged("table past the end", "past the end", one.clone(), entry(1 << 40, 1, 2, 1, 16, "b"));
    damaged("table that isn't aligned", "not aligned", one.clone(), entry(table + 512, 1, 2, 1, 16, "b"));
    damaged("table without an end", "too large", one.clone(), entry(table, u32::MAX, 2, 1, 16, "b"));
    damaged("table that is the L1 table", "same place", one.clone(), entry(L1, 1, 2, 1, 16, "b"));
    damaged("unknown type", "type", one.clone(), entry(table, 1, 2, 77, 16, "b"));
    damaged("unknown flags", "flags", one.clone(), entry(table, 1, 0x80, 1, 16, "b"));
    damaged("granularity of 2^200", "granularity", one.clone(), entry(table, 1, 2, 1, 200, "b"));
    damaged("no name", "name", header(1, 24, END), entry(table, 1, 2, 1, 16, ""));
    for (what, value) in
        [("itself", table), ("the header", 1 << 60), ("nowhere", 1 << 45), ("an odd place", 513)]
    {
        let case = Case::damaged(format!("bitmaps: table that leads to {what}"), "", |image| {
            image.put64(at::AUTOCLEAR, 1).extend(BITMAPS, &one);
            image.put(END, &entry(table, 1, 2, 1, 16, "b")).put64(table, value);
            image.resize(END + 3 * CLUSTER).count(7..10, 1);
        });
        cases.push(case);
    }
    cases.push(Case::new("bitmaps that somebody ignored", Expected::Harmless, "", |image| {
        image.extend(BITMAPS, &header(u32::MAX, u64::MAX, u64::MAX));
    }));
    cases
}
