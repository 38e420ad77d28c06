//! Commits and mirrors among guests, commands and faults, in every order that a seed can bring. Afterwards the guests' disk reads as the model
//! says, wherever it then is; and a copy that was left is what the disk was at one moment.

mod common;

use common::layers::Layers;
use common::{SMALL, Shape, busy, commander, helper};
use headwater_block::{DiskOptions, ErrorKind, Node};
use headwater_job::{
    CommitOptions, JobHandle, MirrorOptions, OnError, Outcome, Status, SyncMode, commit, commit_active,
    mirror,
};
use headwater_sim::{Fault, Op, Rng, Sim, SimFilter, for_seeds};
use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

/// What kind of job is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Commit,
    ActiveCommit,
    Mirror,
}

#[derive(Debug, Default)]
struct Tally {
    pivoted: u32,
    left: u32,
    cancelled: u32,
    failed: u32,
}

impl Tally {
    fn count(&mut self, outcome: &Outcome, pivoted: bool) {
        *match outcome {
            Outcome::Completed if pivoted => &mut self.pivoted,
            Outcome::Completed => &mut self.left,
            Outcome::Cancelled => &mut self.cancelled,
            Outcome::Failed(_) => &mut self.failed,
        } += 1;
    }
}

type Work = Pin<Box<dyn Future<Output = Outcome>>>;

fn shape(sim: &Sim, kind: Kind) -> Shape {
    let random = Shape::random(sim);
    let middles = if kind == Kind::Commit { 1 + random.middles } else { random.middles };
    let options = DiskOptions { copy_on_read: sim.rng().one_in(4), ..random.options };
    Shape { middles, options, ..random }
}

struct Run {
    layers: Rc<Layers>,
    job: JobHandle,
    work: Work,
    /// What the target lacks it reads from the source.
    leans_on_source: bool,
}

/// Makes the chain and the job.
fn begin(sim: &Sim, kind: Kind, faults: bool, commands: bool) -> Run {
    let rng = sim.rng().clone();
    let mut layers = Layers::random(sim, &shape(sim, kind));
    let sync = *rng.pick(&[SyncMode::Full, SyncMode::Top, SyncMode::None]);
    if kind == Kind::Mirror {
        let backing: Option<Rc<dyn Node>> = match sync {
            SyncMode::Full => None,
            SyncMode::Top => layers.top.backing(),
            // What wasn't changed is still read from the source.
            SyncMode::None => Some(SimFilter::new(sim, "the source", layers.disk.clone())),
        };
        layers = layers.with_target_beside(backing);
    }
    let layers = Rc::new(layers);
    let speed = if rng.one_in(4) { rng.range(1 << 20..100 << 20) } else { 0 };
    let on_error = *rng.pick(&[OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc]);
    let wait_for_finalize = commands && rng.one_in(4);
    let finish_fails = faults && rng.one_in(10);
    if kind == Kind::Commit {
        let n = rng.index(layers.middles.len());
        let above = layers.middles.get(n + 1).unwrap_or(&layers.top);
        let options = CommitOptions {
            speed,
            on_error,
            wait_for_finalize,
            bounds: Some(SMALL),
            finish: Some(layers.drop_below(above)),
            ..CommitOptions::default()
        };
        let (job, work) = commit(layers.middles[n].clone(), layers.target.clone(), options);
        return Run { layers, job, work: Box::pin(work), leans_on_source: false };
    }
    // In the beginning, in the middle, or never. A target that reads from the source would wait for the guest that waits for it.
    let may_go_through = kind == Kind::Mirror && sync != SyncMode::None;
    let through = Rc::new(Cell::new(may_go_through && rng.one_in(3)));
    if may_go_through && rng.one_in(3) {
        let (switch, sim) = (through.clone(), sim.clone());
        let _switcher = sim.clone().spawn("switcher", async move {
            sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(6))).await;
            switch.set(true);
        });
    }
    let options = MirrorOptions {
        sync,
        granularity: Some(*rng.pick(&[512, 1024, 4096])),
        write_through: through.clone(),
        speed,
        on_error: on_error.into(),
        wait_for_finalize,
        bounds: Some(SMALL),
        hold_guests: Some(layers.hold_guests()),
        finish: Some(layers.pivot(finish_fails)),
        ..MirrorOptions::default()
    };
    let (source, target) = (layers.disk.clone(), layers.target.clone());
    let leans_on_source = kind == Kind::Mirror && sync == SyncMode::None;
    let (job, work): (_, Work) = if kind == Kind::Mirror {
        let (job, work) = mirror(source, target, options);
        (job, Box::pin(work))
    } else {
        let (job, work) = commit_active(source, target, options);
        (job, Box::pin(work))
    };
    Run { layers, job, work, leans_on_source }
}

fn add_faults(layers: &Layers, rng: &Rng) {
    let kinds = [ErrorKind::Io, ErrorKind::Unavailable, ErrorKind::NoSpace, ErrorKind::TimedOut];
    let devices = layers.devices();
    for _ in 0..rng.range(1..4) {
        let ops = *rng.pick(&[&[Op::Read, Op::Status][..], &[Op::Write, Op::WriteZeroes], &[Op::Flush]]);
        let fault = Fault::sometimes(ops, 0.1, rng.range(1..6), *rng.pick(&kinds));
        devices[rng.index(devices.len())].fail(fault);
    }
}

/// Someone who ends the job, one way or another, once it is ready. Says whether he wanted it to pivot.
async fn ender(sim: Sim, job: JobHandle, may_cancel: bool, wants_pivot: Rc<Cell<bool>>) {
    let rng = sim.rng().clone();
    loop {
        sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(4))).await;
        job.wait_for(|status| matches!(status, Status::Ready | Status::Standby) || status.is_over()).await;
        if job.status().is_over() {
            return;
        }
        sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(4))).await;
        // Commands may be refused, and who is refused comes again.
        match rng.range(0..6) {
            0..3 => wants_pivot.set(job.complete().is_ok() || wants_pivot.get()),
            3 | 4 if job.is_ready() => {
                let _refused = job.request_soft_cancel();
            }
            _ if may_cancel => {
                let _too_late = job.request_cancel();
            }
            _ => {}
        }
    }
}

/// A guest that doesn't stop before the job does.
async fn restless(layers: Rc<Layers>, job: JobHandle) {
    while !job.status().is_over() {
        busy(layers.guest.clone(), 1).await;
        layers.sim.sleep(Duration::from_micros(200)).await;
    }
    busy(layers.guest.clone(), 4).await;
}

fn one_run(seed: u64, kind: Kind, faults: bool, commands: bool, tally: &mut Tally) {
    let sim = Sim::new(seed);
    let rng = sim.rng().clone();
    let Run { layers, job, work, leans_on_source } = begin(&sim, kind, faults, commands);
    if faults {
        add_faults(&layers, &rng);
    }
    let cancels = commands && rng.one_in(3);
    let inner = (sim.clone(), layers.clone(), job.clone());
    let wanted = Rc::new(Cell::new(false));
    let wants_pivot = wanted.clone();
    let outcome = sim.run(async move {
        let (sim, layers, job) = inner;
        let mut guests: Vec<_> =
            (0..3).map(|n| sim.spawn(format!("guest {n}"), busy(layers.guest.clone(), 10))).collect();
        if kind != Kind::Commit && sim.rng().one_in(2) {
            guests.push(sim.spawn("restless", restless(layers.clone(), job.clone())));
        }
        let work = sim.spawn("job", work);
        let _helper = sim.spawn("helper", helper(sim.clone(), job.clone()));
        let _ender = sim.spawn("ender", ender(sim.clone(), job.clone(), cancels, wants_pivot));
        if commands && sim.rng().one_in(2) {
            let _commander = sim.spawn("commander", commander(layers.guest.clone(), job.clone()));
        }
        let reply = if cancels {
            sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(12))).await;
            job.cancel().await.ok()
        } else {
            None
        };
        let outcome = work.await;
        if let Some(reply) = reply {
            assert_eq!(format!("{reply:?}"), format!("{outcome:?}"), "the reply to a cancel is true");
        }
        for guest in guests {
            guest.await;
        }
        assert_eq!(job.status(), Status::Null);
        outcome
    });
    if let Outcome::Failed(error) = &outcome {
        assert!(faults, "nothing was to fail: {error}");
    }
    assert!(cancels || !matches!(outcome, Outcome::Cancelled));
    tally.count(&outcome, kind == Kind::Commit || layers.is_pivoted());
    check_ends(&layers, kind, &outcome, wanted.get());
    sim.run(async move { check(&layers, kind, &outcome, leans_on_source).await });
}

fn check_ends(layers: &Layers, kind: Kind, outcome: &Outcome, wanted_pivot: bool) {
    let completed = matches!(outcome, Outcome::Completed);
    let links: usize = layers.middles.iter().chain([&layers.top]).map(|layer| layer.links().len()).sum();
    assert_eq!(links, usize::from(kind == Kind::Commit && completed), "{outcome:?}");
    assert_eq!(layers.is_pivoted(), kind != Kind::Commit && completed && wanted_pivot, "{outcome:?}");
}

/// Checks what everybody reads in the end.
async fn check(layers: &Layers, kind: Kind, outcome: &Outcome, leans_on_source: bool) {
    layers.repair();
    let completed = matches!(outcome, Outcome::Completed);
    if kind != Kind::Commit && completed && !layers.is_pivoted() && !leans_on_source {
        layers.check_copy().await;
    }
    layers.check_all().await;
    // What the data were moved out of may vanish.
    match kind {
        Kind::Commit => layers.lose_layers_that_are_not_below(&layers.top),
        Kind::ActiveCommit if layers.is_pivoted() => layers.lose_upper_layers(),
        Kind::ActiveCommit | Kind::Mirror => {}
    }
    layers.check_all().await;
    let resized = layers.disk.resize(layers.disk.size() + 512).await;
    assert_ne!(resized.map_err(|error| error.kind()), Err(ErrorKind::InUse), "nobody follows it any more");
}

fn all_ends_were_seen(tally: &Tally, runs: u32, ends: &[u32]) {
    assert!(runs < 100 || ends.iter().all(|n| *n > runs / 50), "not every end was seen: {tally:?}");
}

fn run(kind: Kind, seeds: u64, faults: bool, commands: bool) -> (Tally, u32) {
    let mut tally = Tally::default();
    let mut runs = 0;
    for_seeds(seeds, |seed| {
        runs += 1;
        one_run(seed, kind, faults, commands, &mut tally);
    });
    (tally, runs)
}

#[test]
fn a_commit_below_guests_always_completes() {
    let (tally, runs) = run(Kind::Commit, 200, false, false);
    assert_eq!(tally.pivoted, runs);
}

#[test]
fn a_commit_below_guests_with_commands_and_faults_keeps_every_byte() {
    let (tally, runs) = run(Kind::Commit, 300, true, true);
    all_ends_were_seen(&tally, runs, &[tally.pivoted, tally.cancelled, tally.failed]);
}

#[test]
fn an_active_commit_among_guests_always_ends_well() {
    let (tally, runs) = run(Kind::ActiveCommit, 300, false, false);
    assert_eq!(tally.failed + tally.cancelled, 0);
    all_ends_were_seen(&tally, runs, &[tally.pivoted, tally.left]);
}

#[test]
fn an_active_commit_with_commands_and_faults_keeps_every_byte() {
    let (tally, runs) = run(Kind::ActiveCommit, 400, true, true);
    all_ends_were_seen(&tally, runs, &[tally.pivoted, tally.left, tally.cancelled, tally.failed]);
}

#[test]
fn a_mirror_among_guests_always_ends_well() {
    let (tally, runs) = run(Kind::Mirror, 200, false, false);
    assert_eq!(tally.failed + tally.cancelled, 0);
    all_ends_were_seen(&tally, runs, &[tally.pivoted, tally.left]);
}

#[test]
fn a_mirror_with_commands_and_faults_keeps_every_byte() {
    let (tally, runs) = run(Kind::Mirror, 300, true, true);
    all_ends_were_seen(&tally, runs, &[tally.pivoted, tally.left, tally.cancelled, tally.failed]);
}
