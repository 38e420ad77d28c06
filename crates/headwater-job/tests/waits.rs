//! A source that can't be reached for a time: the job pauses itself, says so, obeys meanwhile, and goes on by itself.

mod common;

use common::{Shape, World, busy, small_options};
use headwater_block::{Clock, ErrorKind, Patience};
use headwater_job::{Event, JobHandle, OnError, Outcome, Status, StreamOptions, Waiting, stream};
use headwater_sim::{Fault, Op, Sim, Task, for_seeds};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// The longest pause between two attempts, and what an attempt may take.
const LATEST: Duration = Duration::from_millis(5_500);

fn patient() -> StreamOptions {
    StreamOptions { patience: Patience::Forever, ..small_options() }
}

fn out_of_reach(world: &World, kind: ErrorKind) {
    world.source.fail(Fault::always(&[Op::Read, Op::Status], kind));
}

/// Failures that pass.
const OUTAGES: [ErrorKind; 2] = [ErrorKind::Unavailable, ErrorKind::TimedOut];

/// Runs a test of a job whose source fails in one of these ways, under a few seeds.
fn with_failing<F>(
    kinds: &[ErrorKind],
    options: impl Fn() -> StreamOptions,
    test: impl Fn(Sim, Rc<World>, JobHandle, Task<Outcome>) -> F,
) where
    F: Future<Output = ()> + 'static,
{
    for seed in 0..25 {
        let sim = Sim::new(seed);
        let world = Rc::new(World::full(&sim, &Shape::plain(64 << 10)));
        out_of_reach(&world, *sim.rng().pick(kinds));
        let (job, work) = stream(world.disk.clone(), options());
        let work = sim.spawn("job", work);
        sim.run(test(sim.clone(), world, job, work));
    }
}

/// Runs a test of a job whose source is out of reach, under a few seeds.
fn with_job<F>(
    options: impl Fn() -> StreamOptions,
    test: impl Fn(Sim, Rc<World>, JobHandle, Task<Outcome>) -> F,
) where
    F: Future<Output = ()> + 'static,
{
    with_failing(&OUTAGES, options, test);
}

async fn waits(job: &JobHandle) {
    job.wait_for(|_| job.waits_for().is_some_and(|wait| wait.what == Waiting::Source)).await;
    assert_eq!(job.status(), Status::Paused);
    assert!(!job.is_paused() && job.trouble().is_some());
}

fn is_completed(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Completed)
}

#[test]
fn it_goes_on_when_the_source_is_back_and_nobody_need_do_anything() {
    with_job(patient, |sim, world, job, work| async move {
        waits(&job).await;
        sim.sleep(Duration::from_secs(300)).await;
        assert_eq!(job.status(), Status::Paused);
        world.source.repair();
        let back = sim.clock().now();
        job.wait_for(|status| status == Status::Running).await;
        assert!(sim.clock().now() - back < LATEST, "it came back after {:?}", sim.clock().now() - back);
        assert!(job.waits_for().is_none() && job.trouble().is_none());
        assert!(is_completed(&work.await));
        world.check_all().await;
        let mut told = Vec::new();
        while let Some(event) = job.try_event() {
            told.push(match event {
                Event::Status(status) => status.to_string(),
                Event::Waits(wait) => format!("waits for {}", wait.what),
                Event::GoesOn(what) => format!("has {what}"),
                Event::Error { error, .. } => panic!("no error counts: {error}"),
            });
        }
        let begin = ["created", "running", "paused", "waits for source", "has source", "running"];
        assert_eq!(told[..begin.len()], begin);
    });
}

#[test]
fn patience_that_ends_leaves_the_error_to_the_policy() {
    let bound = Duration::from_secs(60);
    for on_error in [OnError::Report, OnError::Ignore, OnError::Stop] {
        let options = move || StreamOptions { patience: Patience::For(bound), on_error, ..small_options() };
        with_job(options, move |sim, world, job, work| async move {
            match on_error {
                OnError::Stop => {
                    job.wait_for(|_| job.is_paused()).await;
                    assert!(
                        sim.clock().now() >= bound && sim.clock().now() < bound + LATEST,
                        "{:?}",
                        sim.clock().now()
                    );
                    world.source.repair();
                    sim.sleep(Duration::from_secs(20)).await;
                    assert_eq!(job.status(), Status::Paused, "now it waits for a user");
                    job.resume().unwrap();
                    assert!(is_completed(&work.await));
                }
                _ => {
                    let outcome = work.await;
                    assert!(
                        matches!(&outcome, Outcome::Failed(error) if error.kind().may_pass()),
                        "{outcome:?}"
                    );
                    assert!(sim.clock().now() >= bound, "{:?}", sim.clock().now());
                }
            }
        });
    }
}

#[test]
fn without_patience_and_for_other_errors_nothing_is_waited_for() {
    for (patience, kind) in [
        (Patience::None, ErrorKind::Unavailable),
        (Patience::Forever, ErrorKind::Io),
        (Patience::Forever, ErrorKind::SourceChanged),
        (Patience::Forever, ErrorKind::Corrupt),
    ] {
        let options = move || StreamOptions { patience, ..small_options() };
        with_failing(&[kind], options, move |sim, _, job, work| async move {
            let outcome = work.await;
            assert!(matches!(&outcome, Outcome::Failed(error) if error.kind() == kind), "{outcome:?}");
            assert!(sim.clock().now() < Duration::from_secs(1));
            let waited = |event| matches!(event, Event::Waits(_));
            assert!(!std::iter::from_fn(|| job.try_event()).any(waited));
        });
    }
}

#[test]
fn an_error_that_does_not_pass_ends_the_wait() {
    with_job(patient, |_, world, job, work| async move {
        waits(&job).await;
        world.source.repair();
        out_of_reach(&world, ErrorKind::SourceChanged);
        let outcome = work.await;
        assert!(
            matches!(&outcome, Outcome::Failed(e) if e.kind() == ErrorKind::SourceChanged),
            "{outcome:?}"
        );
    });
}

#[test]
fn a_target_that_fails_is_not_waited_for() {
    with_job(patient, |sim, world, job, work| async move {
        world.source.repair();
        world.top.data().fail(Fault::always(&[Op::Write], ErrorKind::Unavailable));
        assert!(matches!(work.await, Outcome::Failed(_)));
        assert!(job.waits_for().is_none() && sim.clock().now() < LATEST);
    });
}

#[test]
fn commands_count_at_once_while_it_waits() {
    with_job(patient, |sim, world, job, work| async move {
        waits(&job).await;
        // Also when the attempt of the moment gets no answer.
        world.source.repair();
        world.source.stall(&[Op::Read, Op::Status]);
        sim.sleep(Duration::from_secs(20)).await;
        let asked = sim.clock().now();
        job.set_speed(100 << 20).unwrap();
        job.pause().unwrap();
        job.wait_for(|_| job.waits_for().is_none()).await;
        sim.sleep(Duration::from_secs(60)).await;
        assert_eq!((job.status(), job.is_paused()), (Status::Paused, true));
        world.source.release();
        world.source.repair();
        sim.sleep(Duration::from_secs(60)).await;
        assert_eq!(job.status(), Status::Paused, "a user's pause is a user's to end");
        out_of_reach(&world, ErrorKind::TimedOut);
        job.resume().unwrap();
        waits(&job).await;
        // To resume means to try now.
        world.source.repair();
        let asked_again = sim.clock().now();
        job.resume().unwrap();
        job.wait_for(|status| status == Status::Running).await;
        assert!(sim.clock().now() - asked_again < Duration::from_millis(10));
        assert!(job.resume().is_err(), "there is nothing to resume");
        assert!(is_completed(&work.await) && sim.clock().now() > asked);
        world.check_all().await;
    });
    with_job(patient, |sim, world, job, work| async move {
        waits(&job).await;
        world.source.stall(&[Op::Read, Op::Status]);
        sim.sleep(Duration::from_secs(20)).await;
        let asked = sim.clock().now();
        assert!(matches!(job.cancel().await.unwrap(), Outcome::Cancelled));
        assert!(sim.clock().now() - asked < Duration::from_millis(10));
        assert!(matches!(work.await, Outcome::Cancelled));
    });
}

/// The source comes and goes while guests work, jobs are commanded and drains come by.
// race-test: job-pauses-itself
#[test]
fn outages_among_guests_and_commands_cost_no_byte() {
    let mut waited = 0;
    let mut met = 0;
    for_seeds(400, |seed| {
        let sim = Sim::new(seed);
        let world = Rc::new(World::random(&sim, &Shape::random(&sim)));
        let rng = sim.rng().clone();
        let (job, work) = stream(world.disk.clone(), patient());
        let inner = (sim.clone(), world.clone(), job.clone());
        let (outcome, cancels) = sim.run(async move {
            let (sim, world, job) = inner;
            let work = sim.spawn("job", work);
            let guests: Vec<_> =
                (0..2).map(|n| sim.spawn(format!("guest {n}"), busy(world.guest.clone(), 8))).collect();
            for _ in 0..rng.range(1..4) {
                sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(2))).await;
                out_of_reach(&world, *rng.pick(&OUTAGES));
                sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(3))).await;
                if rng.one_in(2) {
                    // Refused if it is over.
                    let _ = job.pause();
                    sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(3))).await;
                    let _ = job.resume();
                }
                if rng.one_in(2) {
                    sim.sleep(rng.duration(Duration::ZERO, Duration::from_secs(20))).await;
                }
                world.source.repair();
            }
            let cancels = rng.one_in(4) && job.request_cancel().is_ok();
            for guest in guests {
                guest.await;
            }
            let outcome = work.await;
            world.check_all().await;
            (outcome, cancels)
        });
        assert!(is_completed(&outcome) || cancels, "{outcome:?}");
        let mut waits = false;
        while let Some(event) = job.try_event() {
            match event {
                Event::Waits(_) => {
                    assert!(!waits);
                    (waits, waited) = (true, waited + 1);
                }
                Event::GoesOn(_) => {
                    assert!(waits);
                    waits = false;
                }
                // What became of a pause that came before the job had paused itself.
                Event::Status(Status::Paused) if !waits => met += 1,
                _ => {}
            }
        }
        assert!(!waits, "a wait that never ended");
    });
    assert!(waited > 0 && met > 0, "{waited} waits, {met} pauses");
}
