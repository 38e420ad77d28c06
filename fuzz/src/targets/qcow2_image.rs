//! Whole qcow2 images that somebody damaged: opened, used, checked, repaired.
//!
//! Input: a byte of flags, a byte with the length of the guest's program in steps of 4 bytes, that program (see `guest`), then the image.
//!
//! Asserted: a check finds the same however little memory it has, and changes nothing unless it may. What a repair says is left is what
//! the next check finds; it makes nothing worse, and doesn't change what a guest can read. And what `guest` asserts.

use super::guest::{Content, Guest, content, verdict};
use super::image::{created, filled, now};
use crate::Target;
use crate::capped::CappedNode;
use arbitrary::{Result, Unstructured};
use headwater_block::memory::MemoryNode;
use headwater_image::Format;
use headwater_image::qcow2::check::{CheckOptions, Repair, check};
use headwater_image::qcow2::create::CreateOptions;
use headwater_image::qcow2::header::{Compression, Header};
use headwater_image::qcow2::{Qcow2Options, snapshots};

/// See the module.
pub const TARGET: Target = Target { name: "qcow2_image", run, seeds, max_len: 50 << 10 };

/// Images by qemu-img with what headwater doesn't make: two snapshots, two bitmaps.
const SNAPSHOTS: &[u8] = include_bytes!("../../seeds/snapshots.qcow2");
const BITMAPS: &[u8] = include_bytes!("../../seeds/bitmaps.qcow2");

fn run(data: &[u8]) {
    // The input ends where it ends.
    let _ = attempt(&mut Unstructured::new(data));
}

fn attempt(input: &mut Unstructured<'_>) -> Result<()> {
    let (flags, steps): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
    let program = input.bytes((usize::from(steps) * 4).min(input.len()))?;
    let image = input.bytes(input.len())?.to_vec();

    list_snapshots(&image);
    let before = verdict(&image, 1 << 20);
    let mut repaired = None;
    if let Ok(report) = &before {
        let again = verdict(&image, 0).expect("a check with little memory");
        assert_eq!(
            (report.corruptions, report.leaks, report.image_end),
            (again.corruptions, again.leaks, again.image_end),
            "{report:#?}\nwith little memory: {again:#?}"
        );
        let repair = if flags & 1 == 0 { Repair::All } else { Repair::Leaks };
        repaired = repaired_image(&image, repair, report.corruptions, report.leaks);
    }
    let options = Qcow2Options {
        read_only: flags & 2 != 0,
        cache_size: u64::from(flags >> 4) << 12,
        ..Qcow2Options::default()
    };
    let image = repaired.filter(|_| flags & 4 != 0).unwrap_or(image);
    if let Ok(mut guest) = Guest::open(image, options) {
        guest.act(&mut Unstructured::new(program))?;
        guest.close();
    }
    Ok(())
}

fn list_snapshots(image: &[u8]) {
    let file = CappedNode::new("fuzzed.qcow2", image.to_vec());
    if let Ok(header) = now(Header::read(&*file))
        && let Ok(list) = now(snapshots::list(&*file, &header))
    {
        assert_eq!(list.len(), header.nb_snapshots as usize);
    }
}

/// Repairs an image in which so much was found, and looks at what became of it.
fn repaired_image(image: &[u8], repair: Repair, corruptions: u64, leaks: u64) -> Option<Vec<u8>> {
    let file = CappedNode::new("fuzzed.qcow2", image.to_vec());
    let report = now(check(file.clone(), CheckOptions { repair, memory: 1 << 20 }));
    let after = file.contents();
    let Ok(report) = report else {
        // What it did until it failed must not make it worse than it says; that is for the next one to find.
        let _ = verdict(&after, 1 << 20);
        return None;
    };
    let found = verdict(&after, 1 << 20).expect("a repaired image can be checked");
    assert_eq!(
        (found.corruptions, found.leaks),
        (report.corruptions, report.leaks),
        "a repair says {report:#?}\nbut then there is {found:#?}"
    );
    assert!(found.corruptions <= corruptions, "a repair made it worse: {report:#?}\n{found:#?}");
    if corruptions == 0 && leaks == 0 {
        // Marks of damage in the header may go.
        assert!(after[80..] == image[80..], "a repair changed an image in which nothing was wrong");
    }
    if found.is_clean() {
        let data_file = MemoryNode::new("data.raw", vec![7; 5000]);
        let reads = |bytes: &[u8]| content(bytes, &data_file, Qcow2Options::default());
        if let Some(before) = reads(image).filter(Content::is_readable) {
            let same = reads(&after).is_some_and(|now| now == before);
            assert!(same, "a repair changed what the guest reads: {report:#?}");
        }
    }
    Some(after)
}

fn seeds() -> Vec<Vec<u8>> {
    let tiny = CreateOptions { cluster_size: 512, ..CreateOptions::new(20 << 10) };
    let with_backing = Some(("base.raw".to_owned(), Format::Raw));
    let kinds = [
        tiny.clone(),
        CreateOptions { version: 2, backing: with_backing.clone(), ..tiny.clone() },
        CreateOptions { refcount_bits: 1, ..tiny.clone() },
        CreateOptions { refcount_bits: 64, backing: with_backing.clone(), ..tiny.clone() },
        CreateOptions { data_file: Some("data.raw".to_owned()), ..tiny.clone() },
        CreateOptions { compression: Compression::Zstd, cluster_size: 1024, ..tiny.clone() },
    ];
    let mut images: Vec<Vec<u8>> = kinds.iter().flat_map(|kind| [created(kind), filled(kind)]).collect();
    images.extend([SNAPSHOTS.to_vec(), BITMAPS.to_vec()]);
    let subclusters =
        CreateOptions { cluster_size: 16 << 10, extended_l2: true, ..CreateOptions::new(64 << 10) };
    let mut image = created(&subclusters);
    // The rest of the last cluster is zero.
    image.truncate((48 << 10) + 16);
    images.push(image);
    let with_program = |(i, image): (usize, &Vec<u8>)| {
        let number = |at: usize| (at * 37 + i) as u8;
        // Steps of six bytes, of every kind.
        let program = (0..48).map(|at| if at % 6 == 0 { (at / 6 * 3 + i) as u8 } else { number(at) });
        [vec![(i as u8) << 4 | (i as u8 & 1) << 2, 12], program.collect(), image.clone()].concat()
    };
    images.iter().enumerate().map(with_program).collect()
}
