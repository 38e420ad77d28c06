//! A stream job with a wide window, guests on overlapping ranges, commands and faults, in every order that a seed can bring.

mod common;

use common::{Shape, World, base, busy, commander, helper, random_trace, small_options};
use headwater_block::{ErrorKind, Node};
use headwater_job::{Event, OnError, Outcome, Status, StreamOptions, stream};
use headwater_sim::{Defect, Fault, Op, Sim, for_seeds};
use std::rc::Rc;
use std::time::Duration;

/// What a run tries.
struct Plan {
    faults: bool,
    commands: bool,
    cancel: bool,
    defect: Defect,
}

#[derive(Debug, Default)]
struct Tally {
    completed: u32,
    cancelled: u32,
    failed: u32,
}

fn add_faults(world: &World) {
    let rng = world.sim.rng();
    let kinds = [ErrorKind::Io, ErrorKind::Unavailable, ErrorKind::NoSpace, ErrorKind::TimedOut];
    let times = rng.range(1..6);
    match rng.range(0..4) {
        0 => world.source.fail(Fault::sometimes(&[Op::Read, Op::Status], 0.1, times, *rng.pick(&kinds))),
        1 => {
            world.top.fail(Fault::sometimes(&[Op::Write, Op::WriteZeroes, Op::Status], 0.1, times, kinds[2]))
        }
        2 => world.top.data().fail(Fault::sometimes(&[Op::Write, Op::Flush], 0.1, times, *rng.pick(&kinds))),
        _ => {
            world.top.fail(Fault::sometimes(&[Op::Header, Op::Flush], 0.5, 1, ErrorKind::Io));
            let bad = rng.byte_range(world.source.size(), 4096, 512);
            world.source.fail(Fault { times, ..Fault::at(&[Op::Read], bad, ErrorKind::Io) });
        }
    }
}

fn one_run(seed: u64, plan: &Plan, tally: &mut Tally) {
    let sim = Sim::new(seed);
    let shape = Shape::random(&sim);
    let world = Rc::new(World::random(&sim, &shape));
    world.top.set_defect(plan.defect);
    let rng = sim.rng().clone();
    let base = rng.one_in(4).then(|| base(rng.pick(&world.layers())));
    let options = StreamOptions {
        base: base.clone(),
        speed: if rng.one_in(4) { rng.range(1 << 20..100 << 20) } else { 0 },
        on_error: *rng.pick(&[OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc]),
        detect_zeroes: rng.one_in(2),
        wait_for_finalize: plan.commands && rng.one_in(4),
        readahead: rng.one_in(2).then(|| rng.range(1..64 << 10)),
        boot_trace: rng.one_in(2).then(|| random_trace(&sim, world.disk.size())),
        ..small_options()
    };
    if plan.defect == Defect::MapsFirst {
        world.top.data().fail(Fault::sometimes(&[Op::Write], 0.3, 20, ErrorKind::Io));
    } else if plan.faults {
        add_faults(&world);
    }
    let copied_on_read = world.disk.copies_on_read();
    let (job, work) = stream(world.disk.clone(), options);
    let cancels = plan.cancel && rng.one_in(2);
    let commands = plan.commands && rng.one_in(2);
    let inner = (sim.clone(), world.clone());
    let outcome = sim.run(async move {
        let (sim, world) = inner;
        let guests: Vec<_> =
            (0..3).map(|n| sim.spawn(format!("guest {n}"), busy(world.guest.clone(), 12))).collect();
        let work = sim.spawn("job", work);
        let _helper = sim.spawn("helper", helper(sim.clone(), job.clone()));
        if commands {
            let _commander = sim.spawn("commander", commander(world.guest.clone(), job.clone()));
        }
        let reply = if cancels {
            sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(8))).await;
            job.cancel().await.ok()
        } else {
            None
        };
        let outcome = work.await;
        for guest in guests {
            guest.await;
        }
        assert_eq!(job.status(), Status::Null);
        if let Some(reply) = reply {
            // race-test: commit-point
            assert_eq!(format!("{reply:?}"), format!("{outcome:?}"), "the reply to a cancel is true");
        }
        check(&world, &outcome, base.as_ref().map(|base| &base.node)).await;
        assert_eq!(world.disk.copies_on_read(), copied_on_read, "what the job switched on ends with it");
        outcome
    });
    match outcome {
        Outcome::Completed => tally.completed += 1,
        Outcome::Cancelled => {
            assert!(cancels);
            tally.cancelled += 1;
        }
        Outcome::Failed(error) => {
            assert!(plan.faults, "nothing was to fail: {error}");
            tally.failed += 1;
        }
    }
}

async fn check(world: &World, outcome: &Outcome, base: Option<&Rc<dyn Node>>) {
    world.source.repair();
    world.top.repair();
    world.top.data().repair();
    world.check_all().await;
    let links = world.top.links();
    if matches!(outcome, Outcome::Completed) {
        assert_eq!(links, [base.map(|base| base.name().to_string())]);
        match (base, world.top.backing()) {
            (None, None) => {}
            (Some(base), Some(backing)) => assert!(Rc::ptr_eq(base, &backing)),
            _ => panic!("the wrong backing"),
        }
        // What is no longer below may vanish.
        let mut gone = world.layers();
        if let Some(base) = base {
            let at = gone.iter().position(|layer| Rc::ptr_eq(layer, base)).expect("in the chain");
            gone.drain(..=at);
        }
        for fault in [Op::Read, Op::Status] {
            let all = Fault::always(&[fault], ErrorKind::Io);
            if base.is_none() {
                world.source.fail(all.clone());
            }
            for middle in &world.middles {
                if gone.iter().any(|layer| layer.name() == middle.name()) {
                    middle.fail(all.clone());
                }
            }
        }
        world.check_all().await;
    } else {
        assert!(links.is_empty(), "the link was changed by a job that {outcome:?}");
        assert!(world.top.backing().is_some());
    }
}

#[test]
fn a_stream_among_guests_always_completes() {
    let plan = Plan { faults: false, commands: false, cancel: false, defect: Defect::None };
    let mut tally = Tally::default();
    for_seeds(400, |seed| one_run(seed, &plan, &mut tally));
    assert_eq!(tally.cancelled + tally.failed, 0);
}

#[test]
fn a_stream_under_commands_and_faults_keeps_every_byte() {
    let plan = Plan { faults: true, commands: true, cancel: true, defect: Defect::None };
    let mut tally = Tally::default();
    let mut runs = 0;
    for_seeds(800, |seed| {
        runs += 1;
        one_run(seed, &plan, &mut tally);
    });
    let ends = [tally.completed, tally.cancelled, tally.failed];
    assert!(runs < 100 || ends.iter().all(|n| *n > runs / 50), "not every end was seen: {tally:?}");
}

/// True if one of some seeds fails with this mistake in the overlay.
fn is_caught(defect: Defect) -> bool {
    let plan = Plan { faults: defect == Defect::MapsFirst, commands: false, cancel: false, defect };
    (0..400).any(|seed| {
        let run = std::panic::AssertUnwindSafe(|| one_run(seed, &plan, &mut Tally::default()));
        std::panic::catch_unwind(run).is_err()
    })
}

#[test]
fn the_harness_notices_deliberate_mistakes() {
    assert!(!is_caught(Defect::None), "without a mistake all is well");
    for defect in [
        Defect::StaleLookUps,
        Defect::DiscardForgets,
        Defect::ClaimsTooMuch,
        Defect::AsksTooLittle,
        Defect::MapsFirst,
    ] {
        assert!(is_caught(defect), "{defect:?} went unnoticed");
    }
}

#[test]
fn a_failing_job_tells_its_error_and_its_states() {
    let sim = Sim::new(3);
    let world = World::full(&sim, &Shape::plain(16 << 10));
    world.source.fail(Fault::always(&[Op::Read], ErrorKind::Io));
    let (job, work) = stream(world.disk.clone(), small_options());
    let outcome = sim.run(work);
    assert!(matches!(&outcome, Outcome::Failed(error) if error.kind() == ErrorKind::Io), "{outcome:?}");
    let mut states = Vec::new();
    let mut errors = 0;
    while let Some(event) = job.try_event() {
        match event {
            Event::Status(status) => states.push(status),
            Event::Error { .. } => errors += 1,
            Event::Waits(_) | Event::GoesOn(_) => panic!("it has no patience"),
        }
    }
    assert_eq!(states, [Status::Created, Status::Running, Status::Aborting, Status::Concluded, Status::Null]);
    assert_eq!(errors, 1);
}
