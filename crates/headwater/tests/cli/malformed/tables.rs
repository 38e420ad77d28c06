//! Tables that lead nowhere, in circles, or to each other; counts that lie; compressed clusters that are none.

use super::case::{Case, Expected};
use super::image::{
    CLUSTER, COMPRESSED, COPIED, DATA, END, GUEST_CLUSTERS, Image, L1, L2, REFBLOCK, REFTABLE, at,
};
use std::io::Write;

/// The places that metadata must not lead to.
const TABLES: [(&str, u64); 5] = [
    ("header", 0),
    ("refcount table", REFTABLE),
    ("refcount block", REFBLOCK),
    ("L1 table", L1),
    ("L2 table", L2),
];

pub(super) fn entries() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut damaged = |name: String, says: &str, damage: &dyn Fn(&mut Image)| {
        cases.push(Case::damaged(name, says, |image| damage(image)));
    };
    for (what, offset) in TABLES {
        let says = if offset == 0 { "" } else { "same place" };
        if what != "L2 table" {
            damaged(format!("L1 entry that leads to the {what}"), says, &|image| {
                image.put64(L1, offset | COPIED);
            });
        }
        if offset == 0 {
            continue;
        }
        damaged(format!("L2 entry that leads to the {what}"), says, &|image| {
            image.put64(L2, offset | COPIED);
        });
        if what != "refcount block" {
            damaged(format!("refcount table that leads to the {what}"), says, &|image| {
                image.put64(REFTABLE, offset);
            });
        }
    }
    damaged("refcount table that leads to data".into(), "same place", &|image| {
        image.put64(REFTABLE, DATA);
    });
    damaged("refcount table that leads to one block twice".into(), "same place", &|image| {
        image.put64(REFTABLE + 8, REFBLOCK);
    });
    for (what, entry) in [
        ("an odd place", 513),
        ("the middle of a cluster", DATA + 512),
        ("past the end", 1 << 40),
        ("the end of the world", (1 << 56) - CLUSTER),
        ("nowhere, with reserved bits", 0x7f << 56),
        ("itself, with a reserved bit", L2 | 1 << 60),
    ] {
        damaged(format!("L1 entry that leads to {what}"), "entry 0", &|image| {
            image.put64(L1, entry | COPIED);
        });
        damaged(format!("L2 entry that leads to {what}"), "entry 0 of the L2 table", &|image| {
            image.put64(L2, entry & !COMPRESSED | COPIED);
        });
        damaged(format!("refcount table that leads to {what}"), "refcount table entry 0", &|image| {
            image.put64(REFTABLE, entry);
        });
    }
    damaged("two L1 entries for one L2 table".into(), "references", &|image| {
        image.put32(at::L1_SIZE, 2).put64(at::SIZE, 1 << 30).put64(L1 + 8, L2 | COPIED);
    });
    damaged("8192 L1 entries for one full L2 table".into(), "references", &|image| {
        image.put32(at::L1_SIZE, 8192).put64(at::SIZE, 8192 << 29);
        for i in 0..8192 {
            image
                .put64(L1 + i * 8, L2 | COPIED)
                .put64(L2 + i * 8, if i % 2 == 0 { DATA | COPIED } else { 1 });
        }
    });
    damaged("all L2 entries for one cluster".into(), "references", &|image| {
        for i in 0..CLUSTER / 8 {
            image.put64(L2 + i * 8, DATA | COPIED);
        }
    });
    damaged("two L2 entries for one cluster".into(), "references", &|image| {
        image.put64(L2 + 8, DATA | COPIED);
    });
    damaged("flag for more than one reference".into(), "reference count isn't one", &|image| {
        image.count(5..6, 2);
    });
    damaged("zero clusters in version 2".into(), "version 2", &|image| {
        image.put32(at::VERSION, 2).put64(L2, 1);
    });
    damaged("more tables than there is room for".into(), "past the end", &|image| {
        image.put32(at::L1_SIZE, 65536).put64(at::SIZE, 65536 << 29);
        for i in 0..65536_u64 {
            image.put64(L1 + i * 8, ((1 << 40) + i * CLUSTER) | COPIED);
        }
    });
    for (what, word, bitmap, says) in [
        ("data and zeroes at once", DATA | COPIED, 1 | 1 << 32, "both"),
        ("data without a cluster", 0, 1, "no host cluster"),
        ("the zero flag", 1, 0, "zero flag"),
        ("compressed data", COMPRESSED | DATA, 1, "subcluster bitmap"),
    ] {
        damaged(format!("subclusters with {what}"), says, &|image| {
            image.put64(at::INCOMPATIBLE, 1 << 4).put64(L2, word).put64(L2 + 8, bitmap);
            image.count(5..6, u16::from(word >= DATA)).count(6..7, 0);
        });
    }
    let case = Case::damaged("compressed cluster in a data file", "external data file", |image| {
        image.data_file("data.raw").put64(L2, COMPRESSED | DATA).count(5..6, 1);
    });
    cases.push(case.beside("data.raw", &Image::of(&[3; 4096])));
    cases
}

/// Clusters all over a file: a map of all of it would be large.
pub(super) fn far_apart() -> Case {
    Case::damaged("clusters all over a file of 4 TiB", "reference count 0", |image| {
        for i in 1..CLUSTER / 8 {
            image.put64(L2 + i * 8, (i << 29) | COPIED);
        }
        let last = (CLUSTER / 8 - 1) << 29;
        image.put64(at::SIZE, 1 << 29).resize(last + CLUSTER);
    })
}

pub(super) fn counts() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut damaged = |name: &str, says: &str, damage: &dyn Fn(&mut Image)| {
        cases.push(Case::damaged(name, says, |image| damage(image)));
    };
    damaged("no counts", "reference count 0", &|image| {
        image.put64(REFTABLE, 0);
    });
    damaged("counts of zero", "reference count 0", &|image| {
        image.count(0..7, 0);
    });
    damaged("the largest counts of 64 bits", "18446744073709551615", &|image| {
        image.put32(at::REFCOUNT_ORDER, 6);
        for cluster in 0..7 {
            image.put64(REFBLOCK + cluster * 8, u64::MAX);
        }
    });
    damaged("more references than counts of one bit can tell", "can tell", &|image| {
        image.put32(at::REFCOUNT_ORDER, 0).put(REFBLOCK, &[0x7f; 1]).put(REFBLOCK + 1, &[0; 13]);
        image.put64(L2 + 8, DATA);
    });
    damaged("a refcount table full of odd entries", "refcount table entry", &|image| {
        image.put(REFTABLE, &[0xff; CLUSTER as usize]);
    });
    damaged("counts far behind the end", "", &|image| {
        image.put64(REFTABLE + CLUSTER - 8, 1 << 50);
    });
    damaged("image that is marked as corrupt", "", &|image| {
        image.put64(at::INCOMPATIBLE, 1 << 1).count(0..1, 0);
    });
    damaged("image that is marked as dirty", "", &|image| {
        image.put64(at::INCOMPATIBLE, 1).count(5..6, 0);
    });
    cases
}

pub(super) fn snapshots() -> Vec<Case> {
    let entry = |l1: u64, l1_size: u32, id: u16, name: u16, extra: u32| {
        let mut bytes = [&l1.to_be_bytes()[..], &l1_size.to_be_bytes()].concat();
        bytes.extend(id.to_be_bytes());
        bytes.extend(name.to_be_bytes());
        bytes.extend([0; 20]);
        bytes.extend(extra.to_be_bytes());
        bytes
    };
    let mut cases = Vec::new();
    let mut one = |what: &str, says: &str, bytes: Vec<u8>| {
        cases.push(Case::damaged(format!("snapshot {what}"), says, |image| {
            image.put32(at::SNAPSHOTS, 1).put64(at::SNAPSHOT_TABLE, END).put(END, &bytes);
            image.put(END + 64, b"1name").resize(END + CLUSTER).count(7..8, 1);
        }));
    };
    one("with its L1 table past the end", "past the end", entry(1 << 40, 1, 1, 4, 16));
    one("with its L1 table at an odd place", "not aligned", entry(L1 + 8, 1, 1, 4, 16));
    one("with the active L1 table", "same place", entry(L1, 1, 1, 4, 16));
    one("with the snapshot table as L1 table", "same place", entry(END, 1, 1, 4, 16));
    one("with a gigantic L1 table", "too large", entry(L1, u32::MAX, 1, 4, 16));
    one("with extra data without an end", "extra data", entry(L1, 0, 1, 4, u32::MAX));
    one("without extra data", "extra data", entry(L1, 0, 1, 4, 0));
    cases.push(Case::damaged("snapshots past the end", "extra data", |image| {
        image.put32(at::SNAPSHOTS, 65536).put64(at::SNAPSHOT_TABLE, END).resize(END + CLUSTER);
    }));
    cases.push(Case::damaged("snapshots in the header", "snapshot", |image| {
        image.put32(at::SNAPSHOTS, 1).put64(at::SNAPSHOT_TABLE, L2);
    }));
    // Each in a block of its own of a file that is mostly holes.
    let long = entry(L1, 0, u16::MAX, u16::MAX, 16);
    let step = (40 + 16 + 2 * 65535_u64).next_multiple_of(8);
    cases.push(Case::damaged("2000 snapshots with names of 64 KiB", "", |image| {
        image.put32(at::SNAPSHOTS, 2000).put64(at::SNAPSHOT_TABLE, 64 * CLUSTER);
        for i in 0..2000 {
            image.put(64 * CLUSTER + i * step, &long);
        }
        image.resize(64 * CLUSTER + 2000 * step);
    }));
    cases.push(Case::damaged("65536 snapshots of one L1 table", "", |image| {
        let entry = entry(L1, 1, 4, 4, 16);
        image.put32(at::SNAPSHOTS, 65536).put64(at::SNAPSHOT_TABLE, END).resize(END + (4 << 20));
        for i in 0..65536 {
            image.put(END + i * 64, &entry);
        }
    }));
    cases
}

/// A compressed cluster of `sectors` more sectors after the first, at `offset`.
fn compressed(offset: u64, sectors: u64) -> u64 {
    COMPRESSED | sectors << (62 - 8) | offset
}

fn deflated(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).expect("memory");
    encoder.finish().expect("memory")
}

pub(super) fn bombs() -> Vec<Case> {
    let mut cases = Vec::new();
    // The first cluster is compressed, into up to two host clusters; what lay there before is not referred to any more.
    let mut packed = |name: &str, expected: Expected, zstd: bool, data: &[u8], sectors: u64| {
        cases.push(Case::new(name, expected, "compressed", |image| {
            if zstd {
                image.put64(at::INCOMPATIBLE, 1 << 3).put(at::COMPRESSION, &[1]);
            }
            image.put64(L2, compressed(END, sectors)).count(5..6, 0).put(END, data).resize(END + 2 * CLUSTER);
            image.count(7..if sectors == 127 { 8 } else { 7 + (sectors * 512 + 512).div_ceil(CLUSTER) }, 1);
        }));
    };
    let one = Expected::Unreadable(1);
    packed("compressed noise", one, false, &[0xa5; 512], 0);
    packed("compressed zeroes", one, false, &[0; 512], 0);
    packed("compressed ones", one, false, &[0xff; 512], 0);
    packed("compressed data that end early", one, false, &deflated(&[7; 1000]), 0);
    packed("zstd noise", one, true, &[0xa5; 512], 0);
    packed("zstd zeroes", one, true, &[0; 512], 0);
    // A frame that says it needs a window of 2 GiB.
    packed("zstd with a gigantic window", one, true, &[0x28, 0xb5, 0x2f, 0xfd, 0, 0xa8, 1, 0, 0], 0);
    let huge = vec![0; 60 << 20];
    let bomb = deflated(&huge);
    // Whoever packs may stop where the cluster is full; so do those who unpack.
    packed("compressed bomb", Expected::Harmless, false, &bomb[..bomb.len().min(CLUSTER as usize)], 127);
    let bomb = zstd::bulk::compress(&huge, 1).expect("memory");
    packed("zstd bomb", Expected::Harmless, true, &bomb, 127);
    for (what, entry, says) in [
        ("past the end", compressed(1 << 40, 100), "past the end"),
        ("over the end", compressed(END - 512, 127), "references"),
        ("in the header", compressed(0, 127), "same place"),
        ("in the L1 table", compressed(L1 + 64, 0), "same place"),
    ] {
        cases.push(Case::damaged(format!("compressed data {what}"), says, |image| {
            image.put64(L2, entry).count(5..6, 0);
        }));
    }
    cases.push(Case::damaged("compressed data for which writing in place is allowed", "in place", |image| {
        image.put64(L2, compressed(DATA, 127) | COPIED);
    }));
    // All clusters of the disk are the same bomb: it must not go off again and again.
    let bomb = deflated(&vec![0; CLUSTER as usize]);
    cases.push(Case::damaged("one bomb for all clusters", "references", |image| {
        image.put(DATA, &bomb);
        for i in 0..GUEST_CLUSTERS {
            image.put64(L2 + i * 8, compressed(DATA, 127));
        }
    }));
    cases
}
