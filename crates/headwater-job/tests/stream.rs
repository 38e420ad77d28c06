//! What the stream job promises, one thing at a time.

mod common;

use common::{Shape, World, base, small_options};
use headwater_block::{Clock, Disk, DiskOptions, ErrorKind, Limits, Node};
use headwater_job::{Action, Event, JobHandle, OnError, Outcome, Status, StreamOptions, stream};
use headwater_sim::{Device, Fault, Fill, Op, Pace, Pages, Sim, SimFile, SimOverlay};
use std::time::Duration;

const MIB: u64 = 1 << 20;

fn run(sim: &Sim, world: &World, options: StreamOptions) -> (JobHandle, Outcome) {
    let (job, work) = stream(world.disk.clone(), options);
    let outcome = sim.run(work);
    (job, outcome)
}

fn failed_with(outcome: &Outcome) -> Option<ErrorKind> {
    match outcome {
        Outcome::Failed(error) => Some(error.kind()),
        _ => None,
    }
}

fn errors(job: &JobHandle) -> Vec<Action> {
    let mut actions = Vec::new();
    while let Some(event) = job.try_event() {
        if let Event::Error { action, .. } = event {
            actions.push(action);
        }
    }
    actions
}

#[test]
fn zeroes_take_no_space_and_the_progress_is_exact() {
    let sim = Sim::new(1);
    let world = World::full(&sim, &Shape::plain(64 << 10));
    let middle = Fill::Zero.bytes(0..16 << 10);
    world.source.preset(16 << 10, &middle);
    let (job, outcome) = run(&sim, &world, small_options());
    assert!(matches!(outcome, Outcome::Completed));
    assert_eq!(world.top.holding_data(), 48);
    assert_eq!(world.top.unallocated(), 0);
    let progress = job.progress();
    assert!(progress.total_is_exact);
    assert_eq!((progress.total, progress.done), (64 << 10, 64 << 10));
    assert_eq!((progress.copied, progress.zeroes, progress.skipped), (48 << 10, 16 << 10, 0));
    assert_eq!(progress.eta, Some(Duration::ZERO));
    assert_eq!(job.status(), Status::Null);
}

#[test]
fn without_detection_zero_data_stay_data() {
    let sim = Sim::new(1);
    let world = World::full(&sim, &Shape::plain(8 << 10));
    world.source.preset(0, &[0; 8 << 10]);
    let options = StreamOptions { detect_zeroes: false, ..small_options() };
    assert!(matches!(run(&sim, &world, options).1, Outcome::Completed));
    assert_eq!(world.top.holding_data(), 8);
}

#[test]
fn a_base_remains_and_nothing_of_it_is_copied() {
    let sim = Sim::new(1);
    let world = World::full(&sim, &Shape { middles: 1, ..Shape::plain(32 << 10) });
    world.middles[0].preset(4096..8192, Some(&Fill::Pattern(9).bytes(4096..8192)));
    let source: std::rc::Rc<dyn Node> = world.source.clone();
    let options = StreamOptions { base: Some(base(&source)), ..small_options() };
    let (job, outcome) = run(&sim, &world, options);
    assert!(matches!(outcome, Outcome::Completed));
    assert_eq!(world.top.holding_data(), 4);
    assert_eq!(world.source.started(Op::Read), 0);
    assert_eq!(job.progress().total, 4096);
    assert!(std::rc::Rc::ptr_eq(&world.top.backing().unwrap(), &source));
    assert_eq!(world.top.links(), [Some("source".to_string())]);
}

#[test]
fn guests_that_read_the_base_meanwhile_copy_nothing_of_it() {
    let sim = Sim::new(1);
    let world = World::full(&sim, &Shape { middles: 1, ..Shape::plain(32 << 10) });
    world.middles[0].preset(4096..8192, Some(&Fill::Pattern(9).bytes(4096..8192)));
    world.model.begin(4096..8192, Fill::Pattern(9)).done();
    let source: std::rc::Rc<dyn Node> = world.source.clone();
    let options = StreamOptions { base: Some(base(&source)), wait_for_finalize: true, ..small_options() };
    let (job, work) = stream(world.disk.clone(), options);
    let inner = sim.clone();
    sim.run(async move {
        let work = inner.spawn("job", work);
        job.wait_for(|status| status == Status::Pending).await;
        world.check_all().await;
        assert_eq!(world.top.holding_data(), 4, "what lies above the base, and no more");
        job.finalize().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        world.check_all().await;
        assert_eq!(world.top.holding_data(), 4);
    });
}

#[test]
fn a_base_that_is_not_below_is_refused() {
    let sim = Sim::new(1);
    let world = World::full(&sim, &Shape::plain(8 << 10));
    let top: std::rc::Rc<dyn Node> = world.top.clone();
    let options = StreamOptions { base: Some(base(&top)), ..small_options() };
    assert_eq!(failed_with(&run(&sim, &world, options).1), Some(ErrorKind::InvalidInput));
    assert_eq!(world.source.started(Op::Read), 0);
}

#[test]
fn an_ignored_error_is_tried_again_at_the_end() {
    let sim = Sim::new(2);
    let world = World::full(&sim, &Shape::plain(32 << 10));
    world.source.fail(Fault::nth(&[Op::Read], 2, ErrorKind::Io));
    world.source.fail(Fault::nth(&[Op::Status], 1, ErrorKind::Io));
    let options = StreamOptions { on_error: OnError::Ignore, ..small_options() };
    let (job, outcome) = run(&sim, &world, options);
    assert!(matches!(outcome, Outcome::Completed));
    assert_eq!(errors(&job), [Action::Ignore, Action::Ignore]);
    assert_eq!((job.progress().done, job.progress().failed), (32 << 10, 0));
}

#[test]
fn an_error_that_is_ignored_and_stays_keeps_the_link() {
    let sim = Sim::new(2);
    let world = World::full(&sim, &Shape::plain(32 << 10));
    world.source.fail(Fault::at(&[Op::Read], 9000..9001, ErrorKind::Io));
    let options = StreamOptions { on_error: OnError::Ignore, ..small_options() };
    let (job, outcome) = run(&sim, &world, options);
    assert_eq!(failed_with(&outcome), Some(ErrorKind::Io));
    assert!(world.top.links().is_empty());
    let missing = world.top.unallocated() as u64;
    assert!((1..=4).contains(&missing), "all but the copy that fails was copied: {missing}");
    assert_eq!(job.progress().failed, missing * 1024);
}

#[test]
fn a_source_that_changed_ends_the_job_whatever_the_policy() {
    for on_error in [OnError::Ignore, OnError::Stop, OnError::Enospc, OnError::Report] {
        let sim = Sim::new(2);
        let world = World::full(&sim, &Shape::plain(32 << 10));
        world.source.fail(Fault::nth(&[Op::Read], 1, ErrorKind::SourceChanged));
        let options = StreamOptions { on_error, ..small_options() };
        assert_eq!(failed_with(&run(&sim, &world, options).1), Some(ErrorKind::SourceChanged));
        assert!(world.top.links().is_empty());
    }
}

#[test]
fn a_job_that_stops_at_an_error_goes_on_when_it_is_resumed() {
    for (on_error, kind) in [(OnError::Stop, ErrorKind::Unavailable), (OnError::Enospc, ErrorKind::NoSpace)] {
        let sim = Sim::new(2);
        let world = World::full(&sim, &Shape::plain(32 << 10));
        let no_space = kind == ErrorKind::NoSpace;
        let broken = if no_space { world.top.data().clone() } else { world.source.clone() };
        broken.fail(Fault::always(&[if no_space { Op::Write } else { Op::Read }], kind));
        let (job, work) = stream(world.disk.clone(), StreamOptions { on_error, ..small_options() });
        let inner = sim.clone();
        let outcome = sim.run(async move {
            let work = inner.spawn("job", work);
            for _ in 0..2 {
                job.wait_for(|status| status == Status::Paused).await;
                assert_eq!(job.trouble().map(|error| error.kind()), Some(kind));
                job.resume().unwrap();
                assert!(job.trouble().is_none());
                job.wait_for(|status| status == Status::Running).await;
            }
            job.wait_for(|status| status == Status::Paused).await;
            broken.repair();
            job.resume().unwrap();
            work.await
        });
        assert!(matches!(outcome, Outcome::Completed), "{outcome:?}");
    }
}

#[test]
fn a_pending_job_waits_for_finalize_and_a_concluded_one_for_dismiss() {
    let sim = Sim::new(2);
    let world = World::full(&sim, &Shape::plain(8 << 10));
    let options = StreamOptions { wait_for_finalize: true, wait_for_dismiss: true, ..small_options() };
    let (job, work) = stream(world.disk.clone(), options);
    assert_eq!(job.status(), Status::Created);
    assert!(job.finalize().is_err() && job.dismiss().is_err());
    let inner = sim.clone();
    let outcome = sim.run(async move {
        let work = inner.spawn("job", work);
        job.wait_for(|status| status == Status::Pending).await;
        inner.sleep(Duration::from_secs(100)).await;
        assert_eq!(job.status(), Status::Pending);
        assert!(job.pause().is_err() && job.set_speed(1).is_err());
        job.finalize().unwrap();
        let outcome = work.await;
        assert_eq!(job.status(), Status::Concluded);
        assert!(job.request_cancel().is_err());
        job.dismiss().unwrap();
        assert_eq!(job.status(), Status::Null);
        outcome
    });
    assert!(matches!(outcome, Outcome::Completed));
}

#[test]
fn a_job_cancelled_before_it_began_does_nothing() {
    let sim = Sim::new(2);
    let world = World::full(&sim, &Shape::plain(8 << 10));
    let (job, work) = stream(world.disk.clone(), small_options());
    job.request_cancel().unwrap();
    assert!(matches!(sim.run(work), Outcome::Cancelled));
    assert_eq!(world.source.started(Op::Read) + world.source.started(Op::Status), 0);
}

#[test]
fn the_speed_is_kept_and_a_change_counts_at_once() {
    let sim = Sim::new(2);
    let world = World::full(&sim, &Shape::plain(256 << 10));
    let options = StreamOptions { speed: 32 << 10, ..small_options() };
    let (job, work) = stream(world.disk.clone(), options);
    let inner = sim.clone();
    sim.run(async move {
        let work = inner.spawn("job", work);
        inner.sleep(Duration::from_secs(4)).await;
        let done = job.progress().done;
        assert!((120 << 10..=140 << 10).contains(&done), "{done} bytes in 4 s");
        job.set_speed(1).unwrap();
        inner.sleep(Duration::from_secs(100)).await;
        assert!(job.progress().done <= done + (8 << 10), "nearly still");
        job.set_speed(0).unwrap();
        let before = inner.clock().now();
        assert!(matches!(work.await, Outcome::Completed));
        assert!(inner.clock().now() - before < Duration::from_millis(100));
    });
}

/// Streams a full source of `size` bytes that is `latency` away. Says how long it took, how much was read at once at most, and how
/// it ended.
fn stream_from_afar(size: u64, latency: Duration, bandwidth: u64) -> (Duration, u64, JobHandle) {
    const UNIT: u32 = 64 << 10;
    let sim = Sim::new(5);
    let mut pages = Pages::new(size, UNIT as usize);
    for at in (0..size).step_by(MIB as usize) {
        pages.write(at, &[1; MIB as usize]);
    }
    let source = SimFile::new(&sim, "source", pages);
    source.set_limits(Limits { remote: true, ..Limits::default() });
    source.set_pace(Pace { least: latency, most: latency, bandwidth });
    source.set_exact_status();
    let top = SimOverlay::new(&sim, "top", size, UNIT, 512, Some(source.clone()));
    for local in [top.data() as &Device, &top] {
        local.set_pace(Pace { least: Duration::ZERO, most: Duration::ZERO, bandwidth: 0 });
    }
    let disk = Disk::new(top, sim.clock(), DiskOptions::default());
    let (job, work) = stream(disk, StreamOptions::default());
    let outcome = sim.run(work);
    assert!(matches!(outcome, Outcome::Completed));
    (sim.clock().now(), source.peak_bytes(Op::Read), job)
}

#[test]
fn a_source_20_ms_away_is_copied_at_its_bandwidth() {
    let latency = Duration::from_millis(20);
    let (took, in_flight, job) = stream_from_afar(128 * MIB, latency, 1346 * MIB);
    // At best: the data, and a round trip each for the look at the source, the copy's own look, the copy and the proof.
    let best = Duration::from_millis(128 * 1000 / 1346) + 4 * latency;
    assert!(took < best + best / 3, "{took:?}, at best {best:?}");
    assert!(in_flight <= 64 * MIB, "{in_flight}");
    assert_eq!(job.progress().copied, 128 * MIB);
}
