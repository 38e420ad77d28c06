//! A repair in which the power is cut: it leaves the image no worse than it was, and another one ends as the first would have.

use crate::case::Case;
use crate::explore::{Tally, guarded, try_run};
use crate::run::Lies;
use crate::world::{Workload, World, now, read, text};
use headwater_block::memory::MemoryNode;
use headwater_image::qcow2::check::{CheckOptions, CheckReport, Repair, check};
use headwater_image::qcow2::header::Header;
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_sim::{Cuts, Pages, Recorder, Rng, Sim, SimFile};
use std::rc::Rc;

/// Repairs what a run left, leaks or damage, and cuts the power everywhere in that.
pub(crate) fn explore(seed: u64, samples: u64, tally: &mut Tally) -> Result<(), String> {
    let rng = Rng::new(seed ^ 0x7265_7061_6972);
    let workload = *rng.pick(&[Workload::Alone, Workload::Snapshot, Workload::Alone]);
    let short = rng.one_in(2);
    let world = World::new(workload, seed, short);
    let case = Case::random(workload, seed, short, world.create.size, world.create.cluster_size);
    let run = try_run(&case, &world, Lies::default())?;
    let mut cuts = Cuts::new(&run.history);
    let stop = rng.index(run.history.events.len() + 1);
    while cuts.moment() < stop && cuts.advance() {}
    let mut image = cuts.files(&cuts.sample(&rng)).remove(0);
    let repair = if rng.one_in(3) { Repair::Leaks } else { Repair::All };
    if repair == Repair::All {
        damage(&rng, &mut image)?;
    }
    let before = content(&image)?;
    let found = check_bytes(&image, Repair::None)?.0;
    let (first, _) = check_bytes(&image, repair)?;

    let sim = Sim::new(seed);
    let mut pages = Pages::new(0, 512);
    pages.write(0, &image);
    let file = SimFile::new(&sim, "image", pages);
    let recorder = Recorder::start(&[&file]);
    sim.run(async move { check(file, CheckOptions { repair, ..CheckOptions::default() }).await })
        .map_err(text)?;
    let history = recorder.history();
    let mut cuts = Cuts::new(&history);
    tally.runs += 1;
    loop {
        tally.moments += 1;
        let exhaust = cuts.combinations() <= 64;
        tally.exhausted += u64::from(exhaust);
        let look = |image: &[u8]| {
            if content(image)? != before {
                return Err("the guest reads something else".to_string());
            }
            let (left, _) = check_bytes(image, Repair::None)?;
            if left.corruptions > found.corruptions && repair == Repair::Leaks {
                return Err(format!("it is worse than before: {left:#?}"));
            }
            let (again, repaired) = check_bytes(image, repair)?;
            if again.corruptions > first.corruptions || again.leaks > first.leaks {
                return Err(format!("another repair ends with {again:#?}, the first with {first:#?}"));
            }
            if content(&repaired)? != before {
                return Err("after another repair the guest reads something else".to_string());
            }
            Ok(())
        };
        let mut try_one = |choice| {
            if !tally.is_new(cuts.hash(&choice), 0) {
                return Ok(());
            }
            let bytes = cuts.files(&choice).remove(0);
            guarded(|| look(&bytes)).map_err(|error| {
                let moment = cuts.moment();
                format!("{repair:?}, cut after event {moment}:\n{}and then: {error}", cuts.describe(&choice))
            })
        };
        if exhaust {
            cuts.all().try_for_each(&mut try_one)?;
        } else {
            (0..samples).try_for_each(|_| try_one(cuts.sample(&rng)))?;
        }
        if !cuts.advance() {
            return Ok(());
        }
    }
}

/// Damages what a repair can restore: reference counts, where their blocks are, and flags.
fn damage(rng: &Rng, image: &mut [u8]) -> Result<(), String> {
    let header = now(Header::read(&*MemoryNode::new("image", image.to_vec()))).map_err(text)?;
    let cluster = header.cluster_size() as usize;
    let word = |image: &[u8], at: usize| image[at..at + 8].iter().fold(0, |n, b| n << 8 | u64::from(*b));
    let (l1, table) = (header.l1_table_offset as usize, header.refcount_table_offset as usize);
    let block = word(image, table) as usize;
    for _ in 0..rng.range(1..6) {
        match rng.range(0..8) {
            // A block is lost.
            0 if block > 0 => image[table..table + 8].fill(0),
            // Flags of an L2 table, or of the L1 table.
            1..4 if header.l1_size > 0 => {
                let l2 = (word(image, l1) & 0x00ff_ffff_ffff_fe00) as usize;
                let wide = if header.has_extended_l2() { 16 } else { 8 };
                let at = l2 + rng.index(cluster / wide) * wide;
                let standard = at > 0 && l2 > 0 && at + 8 <= image.len();
                if standard && word(image, at) & 0x00ff_ffff_ffff_fe00 != 0 {
                    image[at] ^= 0x80;
                } else if word(image, l1) != 0 {
                    image[l1] ^= 0x80;
                }
            }
            _ if block > 0 && block + cluster <= image.len() => {
                image[block + rng.index(cluster.min(64))] = rng.range(0..256) as u8;
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_bytes(image: &[u8], repair: Repair) -> Result<(CheckReport, Vec<u8>), String> {
    let file = MemoryNode::new("image", image.to_vec());
    let report =
        now(check(file.clone(), CheckOptions { repair, ..CheckOptions::default() })).map_err(text)?;
    Ok((report, file.contents()))
}

/// What the guest reads.
fn content(image: &[u8]) -> Result<Vec<u64>, String> {
    let options = Qcow2Options { read_only: true, ..Qcow2Options::default() };
    let file = MemoryNode::new("image", image.to_vec());
    let node: Rc<Qcow2Node> = now(Qcow2Node::open(file, Children::default(), options)).map_err(text)?;
    read(&*node)
}
