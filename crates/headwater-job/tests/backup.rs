//! Backups among guests, commands and faults, in every order that a seed can bring. What was completed holds what the disk read as at the moment when
//! it began, to the byte; the guests' disk reads as the model says; and nothing touches the target after the end.

mod common;

use common::layers::Layers;
use common::{SMALL, Shape, busy, commander, helper};
use headwater_block::filter::SnapshotAccessNode;
use headwater_block::{Buffer, Disk, DiskOptions, ErrorKind, Node, PointInTime};
use headwater_job::{BackupOptions, OnError, OnErrors, Outcome, Status, SyncMode, backup};
use headwater_sim::{Fault, Fill, Op, Pages, Rng, Sim, SimFile, SimOverlay, for_seeds};
use std::rc::Rc;
use std::time::Duration;

#[derive(Debug, Default)]
struct Tally {
    completed: u32,
    cancelled: u32,
    failed: u32,
}

/// Where the copy goes.
struct Target {
    disk: Rc<Disk>,
    /// It can fail.
    file: Rc<SimFile>,
    overlay: Option<Rc<SimOverlay>>,
}

impl Target {
    /// A file that holds something else, or an overlay that has what isn't copied from below.
    fn new(sim: &Sim, layers: &Layers, sync: SyncMode) -> Self {
        let size = layers.disk.size();
        let backing: Option<Rc<dyn Node>> = match sync {
            SyncMode::Full | SyncMode::None => None,
            SyncMode::Top => layers.top.backing(),
        };
        let (top, file, overlay): (Rc<dyn Node>, _, _) = match backing {
            Some(backing) => {
                let unit = *sim.rng().pick(&[512, 2048, 8192]);
                let overlay = SimOverlay::new(sim, "copy", size, unit, 512, Some(backing));
                (overlay.clone(), overlay.data().clone(), Some(overlay))
            }
            None => {
                let mut pages = Pages::new(size, 512);
                pages.write(0, &Fill::Pattern(200).bytes(0..size));
                let file = SimFile::new(sim, "copy", pages);
                (file.clone(), file, None)
            }
        };
        let disk = Disk::new(top, sim.clock(), DiskOptions::default());
        Self { disk, file, overlay }
    }

    fn repair(&self) {
        self.file.repair();
        self.overlay.iter().for_each(|overlay| overlay.repair());
    }

    async fn holds(&self, then: &Buffer) {
        let copy = self.disk.read(0, then.len() as u64).await.expect("the copy can be read");
        let differs = copy.iter().zip(&then[..]).position(|(a, b)| a != b);
        assert_eq!(differs, None, "the copy differs from that moment at that offset");
    }
}

/// Lets the moment come, in between of whatever guests do. Says what the disk then read as.
async fn the_moment(layers: &Layers, target: &Target, sync: SyncMode) -> (Rc<PointInTime>, Buffer) {
    let rng = layers.sim.rng();
    layers.sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(3))).await;
    let held = layers.edge.drain().await;
    let then = loop {
        match layers.disk.read_beside_guests(0..layers.disk.size()).await {
            Ok(then) => break then,
            Err(_) => layers.sim.sleep(Duration::from_micros(100)).await,
        }
    };
    let above = (sync == SyncMode::Top).then(|| layers.top.backing()).flatten();
    let granularity = *rng.pick(&[512, 1024, 4096]);
    let point = layers.disk.begin_point_in_time(&target.disk, granularity, above).await;
    drop(held);
    (point, then)
}

fn add_faults(layers: &Layers, target: &Target, rng: &Rng) {
    let kinds = [ErrorKind::Io, ErrorKind::Unavailable, ErrorKind::NoSpace, ErrorKind::TimedOut];
    let mut devices = layers.devices();
    devices.push(&target.file);
    devices.push(&target.file);
    devices.extend(target.overlay.iter().map(|overlay| &***overlay));
    for _ in 0..rng.range(1..4) {
        let ops = *rng.pick(&[&[Op::Read, Op::Status][..], &[Op::Write, Op::WriteZeroes], &[Op::Flush]]);
        let fault = Fault::sometimes(ops, 0.1, rng.range(1..6), *rng.pick(&kinds));
        devices[rng.index(devices.len())].fail(fault);
    }
}

/// Checks, with the guests held back, that what isn't pending is in the target, and that what is pending hasn't changed.
async fn is_kept(layers: &Layers, target: &Target, point: &PointInTime, then: &Buffer) {
    let _held = layers.edge.drain().await;
    let now = layers.disk.read_beside_guests(0..layers.disk.size()).await.expect("nothing fails");
    let copy = target.disk.read(0, layers.disk.size()).await.expect("nothing fails");
    let mut at = 0;
    while at < then.len() {
        let pending = point
            .next_pending(at as u64)
            .map_or(then.len()..then.len(), |run| run.start as usize..run.end as usize);
        assert_eq!(copy[at..pending.start], then[at..pending.start], "saved, from {at}");
        assert_eq!(now[pending.clone()], then[pending.clone()], "pending: {pending:?}");
        at = pending.end;
    }
}

fn one_run(seed: u64, faults: bool, commands: bool, tally: &mut Tally) {
    let sim = Sim::new(seed);
    let rng = sim.rng().clone();
    let random = Shape::random(&sim);
    let options = DiskOptions { copy_on_read: rng.one_in(4), ..random.options };
    let layers = Rc::new(Layers::random(&sim, &Shape { options, ..random }));
    let sync = *rng.pick(&[SyncMode::Full, SyncMode::Full, SyncMode::Top, SyncMode::None]);
    let target = Rc::new(Target::new(&sim, &layers, sync));
    let policies = [OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc];
    let options = BackupOptions {
        only_changes: sync == SyncMode::None,
        speed: if rng.one_in(4) { rng.range(1 << 20..100 << 20) } else { 0 },
        on_error: OnErrors { source: *rng.pick(&policies), target: *rng.pick(&policies) },
        wait_for_finalize: commands && rng.one_in(4),
        bounds: Some(SMALL),
        ..BackupOptions::default()
    };
    let cancels = sync == SyncMode::None || (commands && rng.one_in(3));
    let inner = (sim.clone(), layers.clone(), target.clone());
    let (outcome, then) = sim.run(async move {
        let (sim, layers, target) = inner;
        let guests: Vec<_> =
            (0..3).map(|n| sim.spawn(format!("guest {n}"), busy(layers.guest.clone(), 15))).collect();
        let (point, then) = the_moment(&layers, &target, sync).await;
        if faults {
            add_faults(&layers, &target, sim.rng());
        }
        let (job, work) = backup(point.clone(), options);
        let work = sim.spawn("job", work);
        let _helper = sim.spawn("helper", helper(sim.clone(), job.clone()));
        if commands && sim.rng().one_in(2) {
            let _commander = sim.spawn("commander", commander(layers.guest.clone(), job.clone()));
        }
        if cancels {
            sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(8))).await;
            if sync == SyncMode::None && !faults {
                is_kept(&layers, &target, &point, &then).await;
            }
            drop(point);
            if let Ok(reply) = job.cancel().await {
                assert_eq!(format!("{reply:?}"), format!("{:?}", job.outcome().expect("it is over")));
            }
        } else {
            drop(point);
        }
        let outcome = work.await;
        assert_eq!(job.status(), Status::Null);
        // Nothing is written there any more, whatever the guests are in the middle of.
        target.file.fail(Fault::always(&[Op::Write, Op::WriteZeroes], ErrorKind::Closed));
        for guest in guests {
            guest.await;
        }
        (outcome, then)
    });
    if let Outcome::Failed(error) = &outcome {
        assert!(faults, "nothing was to fail: {error}");
    }
    assert!(cancels || !matches!(outcome, Outcome::Cancelled));
    match outcome {
        Outcome::Completed => tally.completed += 1,
        Outcome::Cancelled => tally.cancelled += 1,
        Outcome::Failed(_) => tally.failed += 1,
    }
    sim.run(async move {
        layers.repair();
        target.repair();
        layers.check_all().await;
        if matches!(outcome, Outcome::Completed) {
            target.holds(&then).await;
        }
        let resized = layers.disk.resize(layers.disk.size() + 512).await;
        assert_ne!(
            resized.map_err(|error| error.kind()),
            Err(ErrorKind::InUse),
            "nobody follows it any more"
        );
    });
}

fn run(seeds: u64, faults: bool, commands: bool) -> (Tally, u32) {
    let mut tally = Tally::default();
    let mut runs = 0;
    for_seeds(seeds, |seed| {
        runs += 1;
        one_run(seed, faults, commands, &mut tally);
    });
    (tally, runs)
}

#[test]
fn a_backup_among_guests_is_what_the_disk_was() {
    let (tally, runs) = run(200, false, false);
    assert!(runs < 100 || tally.completed > runs / 2, "{tally:?}");
    assert_eq!(tally.failed, 0);
}

#[test]
fn a_backup_with_commands_and_faults_is_what_the_disk_was_or_fails() {
    let (tally, runs) = run(300, true, true);
    let ends = [tally.completed, tally.cancelled, tally.failed];
    assert!(runs < 100 || ends.iter().all(|n| *n > runs / 50), "not every end was seen: {tally:?}");
}

#[test]
fn a_moment_that_is_copied_can_be_forgotten_on_the_way() {
    const SIZE: u64 = 16 << 10;
    for seed in 0..25 {
        let sim = Sim::new(seed);
        let inner = sim.clone();
        sim.run(async move {
            let layers = Rc::new(Layers::plain(&inner, &Shape::plain(SIZE)));
            let disk = |name: &str| {
                let file = SimFile::new(&inner, name, Pages::new(SIZE, 512));
                (file.clone(), Disk::new(file, inner.clock(), DiskOptions::default()))
            };
            let (saved_file, saved) = disk("saved");
            let (_, target) = disk("copy");
            let moment = layers.disk.begin_point_in_time(&saved, 1024, None).await;
            let shown =
                Disk::new(SnapshotAccessNode::new(moment.clone()), inner.clock(), DiskOptions::default());
            let then = shown.read(0, SIZE).await.unwrap();
            let guests = inner.spawn("guests", busy(layers.guest.clone(), 60));
            let point = shown.begin_point_in_time(&target, 1024, None).await;
            let options = BackupOptions { forgets: Some(moment.clone()), ..BackupOptions::default() };
            let (_job, work) = backup(point, options);
            assert!(matches!(inner.spawn("job", work).await, Outcome::Completed));
            guests.await;
            assert!(target.read(0, SIZE).await.unwrap()[..] == then[..], "the copy is whole");
            assert_eq!(moment.pending(), 0, "guests save nothing more");
            assert!(shown.read(0, 1).await.is_err());
            assert_eq!(saved_file.bytes(Op::Discard), SIZE, "its space was given back");
            layers.check_all().await;
        });
    }
}
