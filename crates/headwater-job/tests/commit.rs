//! What commits and mirrors promise, one thing at a time.

mod common;

use common::layers::Layers;
use common::{SMALL, Shape};
use headwater_block::{Disk, DiskOptions, ErrorKind};
use headwater_job::{
    Action, CommitOptions, Event, Illegal, IoStatus, JobHandle, MirrorOptions, OnError, Operation, Outcome,
    Status, SyncMode, commit, commit_active, mirror,
};
use headwater_sim::{Fault, Fill, Op, Pages, Sim, SimFile, Task};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 32 << 10;

/// A full base, a layer above it with 4 KiB of data and 4 KiB of zeroes, and an empty top.
fn layers(sim: &Sim, shape: Shape) -> Rc<Layers> {
    let layers = Layers::plain(sim, &Shape { middles: 1, ..shape });
    for (range, fill) in [(4096..8192, Fill::Pattern(9)), (16384..20480, Fill::Zero)] {
        let bytes = fill.bytes(range.clone());
        layers.middles[0].preset(range.clone(), (fill != Fill::Zero).then_some(&bytes[..]));
        layers.model.begin(range, fill).done();
    }
    Rc::new(layers)
}

/// Runs a test on such a chain under a few seeds.
fn with_layers<F: Future<Output = ()> + 'static>(test: impl Fn(Sim, Rc<Layers>) -> F) {
    for seed in 0..20 {
        let sim = Sim::new(seed);
        let layers = layers(&sim, Shape::plain(SIZE));
        sim.run(test(sim.clone(), layers));
    }
}

fn commit_options() -> CommitOptions {
    CommitOptions { bounds: Some(SMALL), ..CommitOptions::default() }
}

fn active_options(layers: &Layers) -> MirrorOptions {
    MirrorOptions {
        granularity: Some(1024),
        bounds: Some(SMALL),
        hold_guests: Some(layers.hold_guests()),
        finish: Some(layers.pivot(false)),
        ..MirrorOptions::default()
    }
}

fn start_commit(sim: &Sim, layers: &Layers, options: CommitOptions) -> (JobHandle, Task<Outcome>) {
    let (job, work) = commit(layers.middles[0].clone(), layers.target.clone(), options);
    (job, sim.spawn("job", work))
}

fn start_active(sim: &Sim, layers: &Layers, options: MirrorOptions) -> (JobHandle, Task<Outcome>) {
    let (job, work) = commit_active(layers.disk.clone(), layers.target.clone(), options);
    (job, sim.spawn("job", work))
}

fn failed_with(outcome: &Outcome) -> Option<ErrorKind> {
    match outcome {
        Outcome::Failed(error) => Some(error.kind()),
        _ => None,
    }
}

/// The events as words.
fn events(job: &JobHandle) -> String {
    let mut words = Vec::new();
    while let Some(event) = job.try_event() {
        words.push(match event {
            Event::Status(status) => status.to_string(),
            Event::Error { action, operation, .. } => format!("{operation:?}-error:{action:?}"),
            Event::Waits(_) | Event::GoesOn(_) => panic!("it has no patience"),
        });
    }
    words.join(" ")
}

#[test]
fn a_commit_moves_what_lies_above_and_touches_nothing_else() {
    with_layers(|sim, layers| async move {
        let options = CommitOptions { finish: Some(layers.drop_below(&layers.top)), ..commit_options() };
        let (job, work) = start_commit(&sim, &layers, options);
        assert!(matches!(work.await, Outcome::Completed));
        assert_eq!((layers.file.bytes(Op::Write), layers.file.bytes(Op::WriteZeroes)), (4096, 4096));
        assert_eq!(layers.file.started(Op::Flush), 1);
        let progress = job.progress();
        assert_eq!(
            (progress.total, progress.done, progress.copied, progress.zeroes),
            (4096, 4096, 4096, 4096)
        );
        assert_eq!(events(&job), "created running waiting pending concluded null");
        layers.lose_layers_that_are_not_below(&layers.top);
        layers.check_all().await;
    });
}

#[test]
fn a_smaller_base_grows_and_a_larger_one_keeps_its_end() {
    for source_size in [5000, SIZE + 4096] {
        let sim = Sim::new(source_size);
        let layers = layers(&sim, Shape { source_size, ..Shape::plain(SIZE) });
        let options = CommitOptions { finish: Some(layers.drop_below(&layers.top)), ..commit_options() };
        let inner = sim.clone();
        sim.run(async move {
            let (_, work) = start_commit(&inner, &layers, options);
            assert!(matches!(work.await, Outcome::Completed));
            assert_eq!(layers.target.size(), source_size.max(SIZE));
            layers.lose_layers_that_are_not_below(&layers.top);
            layers.check_all().await;
            let end = SIZE.min(source_size)..source_size;
            let kept = layers.target.read(end.start, end.end - end.start).await.unwrap();
            assert_eq!(&kept[..], Fill::Pattern(1).bytes(end));
        });
    }
}

#[test]
fn what_cannot_be_committed_is_refused_and_nothing_is_written() {
    with_layers(|sim, layers| async move {
        let try_it = |top, base| commit(top, base, commit_options()).1;
        let itself = try_it(layers.target.top(), layers.target.clone());
        assert_eq!(failed_with(&sim.spawn("itself", itself).await), Some(ErrorKind::InvalidInput));
        let other = Disk::new(
            SimFile::new(&sim, "other", Pages::new(SIZE, 512)),
            sim.clock(),
            DiskOptions::default(),
        );
        let not_below = try_it(layers.middles[0].clone(), other);
        assert_eq!(failed_with(&sim.spawn("other", not_below).await), Some(ErrorKind::InvalidInput));
        layers.file.set_read_only(true);
        let read_only = try_it(layers.middles[0].clone(), layers.target.clone());
        assert_eq!(failed_with(&sim.spawn("read-only", read_only).await), Some(ErrorKind::ReadOnly));
        assert_eq!(layers.file.started(Op::Write) + layers.file.started(Op::WriteZeroes), 0);
    });
}

#[test]
fn an_error_says_which_half_failed_and_holds_the_job_up_until_it_is_resumed() {
    for (operation, kind, io_status) in [
        (Operation::Read, ErrorKind::Io, IoStatus::Failed),
        (Operation::Write, ErrorKind::NoSpace, IoStatus::NoSpace),
    ] {
        with_layers(move |sim, layers| async move {
            match operation {
                Operation::Read => layers.middles[0].data().fail(Fault::nth(&[Op::Read], 0, kind)),
                Operation::Write => layers.file.fail(Fault::nth(&[Op::Write], 0, kind)),
            }
            let options = CommitOptions { on_error: OnError::Stop, ..commit_options() };
            let (job, work) = start_commit(&sim, &layers, options);
            job.wait_for(|status| status == Status::Paused).await;
            assert_eq!((job.io_status(), job.is_paused(), job.is_busy()), (io_status, true, false));
            assert_eq!(job.pause(), Err(Illegal::AlreadyPaused));
            assert_eq!(job.request_soft_cancel(), Err(Illegal::Paused));
            job.resume().unwrap();
            assert_eq!((job.io_status(), job.is_paused()), (IoStatus::Ok, false));
            assert_eq!(job.resume(), Err(Illegal::NotPaused));
            assert!(matches!(work.await, Outcome::Completed));
            let expected = format!(
                "created running {operation:?}-error:Stop paused running waiting pending concluded null"
            );
            assert_eq!(events(&job), expected);
        });
    }
}

#[test]
fn the_error_policy_can_be_changed_while_it_runs() {
    with_layers(|sim, layers| async move {
        layers.file.fail(Fault::always(&[Op::Write], ErrorKind::Io));
        let options = CommitOptions { on_error: OnError::Stop, ..commit_options() };
        let (job, work) = start_commit(&sim, &layers, options);
        job.wait_for(|status| status == Status::Paused).await;
        job.set_on_error(OnError::Report);
        job.resume().unwrap();
        assert_eq!(failed_with(&work.await), Some(ErrorKind::Io));
        let errors = "Write-error:Stop paused running Write-error:Report";
        assert_eq!(events(&job), format!("created running {errors} aborting concluded null"));
        assert_eq!(job.resume(), Err(Illegal::NotPaused), "whatever its state");
        layers.check_all().await;
    });
}

#[test]
fn a_job_that_is_told_to_pause_before_it_starts_runs_and_pauses() {
    with_layers(|sim, layers| async move {
        let (job, work) = commit(layers.middles[0].clone(), layers.target.clone(), commit_options());
        job.pause().unwrap();
        let work = sim.spawn("job", work);
        job.wait_for(|status| status == Status::Paused).await;
        assert_eq!(layers.file.started(Op::Write), 0);
        job.request_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled));
        assert_eq!(events(&job), "created running paused running aborting concluded null");
    });
}

#[test]
fn an_active_commit_is_ready_and_completes_with_the_guests_on_the_base() {
    with_layers(|sim, layers| async move {
        layers.write(0..1024, 3).await.unwrap();
        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        assert_eq!(job.complete().unwrap_err().to_string(), "a job that is created doesn't take `complete`");
        job.wait_for(|status| status == Status::Ready).await;
        assert!(job.is_ready());
        let progress = job.progress();
        assert_eq!(progress.total, progress.done);
        layers.write(8192..8292, 4).await.unwrap();
        layers.zero(0..2048, true).await.unwrap();
        job.complete().unwrap();
        job.complete().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        assert!(layers.is_pivoted());
        layers.lose_upper_layers();
        layers.check_all().await;
        assert_eq!(events(&job), "created running ready waiting pending concluded null");
    });
}

#[test]
fn a_soft_cancel_leaves_a_copy_and_a_forced_one_gives_up() {
    with_layers(|sim, layers| async move {
        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        job.wait_for(|status| status == Status::Ready).await;
        layers.write(0..1024, 3).await.unwrap();
        job.request_soft_cancel().unwrap();
        assert_eq!(job.complete(), Err(Illegal::Ending));
        assert!(matches!(work.await, Outcome::Completed));
        assert!(!layers.is_pivoted());
        layers.check_copy().await;
        assert_eq!(events(&job), "created running ready waiting pending concluded null");

        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        job.wait_for(|status| status == Status::Ready).await;
        job.request_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled));
        assert_eq!(events(&job), "created running ready aborting concluded null");

        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        job.request_soft_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled), "it wasn't ready");
        layers.check_all().await;
    });
}

#[test]
fn a_ready_job_pauses_to_standby_and_completes_when_it_is_resumed() {
    with_layers(|sim, layers| async move {
        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        job.wait_for(|status| status == Status::Ready).await;
        job.pause().unwrap();
        job.wait_for(|status| status == Status::Standby).await;
        layers.write(0..1024, 3).await.unwrap();
        let written = layers.file.started(Op::Write);
        assert_eq!(job.request_soft_cancel(), Err(Illegal::Paused));
        job.complete().unwrap();
        sim.sleep(Duration::from_secs(1)).await;
        assert_eq!((job.status(), layers.file.started(Op::Write)), (Status::Standby, written));
        job.resume().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        assert!(layers.is_pivoted());
        assert_eq!(events(&job), "created running ready standby ready waiting pending concluded null");

        layers.edge.replace(&layers.edge.drain().await, layers.disk.clone());
        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        job.wait_for(|status| status == Status::Ready).await;
        job.pause().unwrap();
        job.wait_for(|status| status == Status::Standby).await;
        job.request_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled));
        assert_eq!(events(&job), "created running ready standby ready aborting concluded null");
    });
}

#[test]
fn guests_go_on_while_an_active_commit_waits_to_be_finalised() {
    with_layers(|sim, layers| async move {
        let options = MirrorOptions {
            wait_for_finalize: true,
            wait_for_dismiss: true,
            on_error: OnError::Stop.into(),
            ..active_options(&layers)
        };
        let (job, work) = start_active(&sim, &layers, options);
        job.wait_for(|status| status == Status::Ready).await;
        job.complete().unwrap();
        job.wait_for(|status| status == Status::Pending).await;
        layers.write(0..3000, 3).await.unwrap();
        sim.sleep(Duration::from_secs(1)).await;
        layers.discard(9000..12000).await.unwrap();
        job.finalize().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        layers.lose_upper_layers();
        layers.check_all().await;
        assert_eq!(events(&job), "created running ready waiting pending concluded");
        job.dismiss().unwrap();
    });
}

#[test]
fn a_pending_job_cannot_stop_at_an_error() {
    with_layers(|sim, layers| async move {
        let options = MirrorOptions {
            wait_for_finalize: true,
            on_error: OnError::Stop.into(),
            ..active_options(&layers)
        };
        let (job, work) = start_active(&sim, &layers, options);
        job.wait_for(|status| status == Status::Ready).await;
        job.complete().unwrap();
        job.wait_for(|status| status == Status::Pending).await;
        layers.file.fail(Fault::nth(&[Op::Flush], 0, ErrorKind::Io));
        job.finalize().unwrap();
        assert_eq!(failed_with(&work.await), Some(ErrorKind::Io));
        assert!(!layers.is_pivoted());
        layers.check_all().await;
    });
}

#[test]
fn a_finish_that_fails_fails_the_job_and_the_guests_stay() {
    with_layers(|sim, layers| async move {
        let options = MirrorOptions { finish: Some(layers.pivot(true)), ..active_options(&layers) };
        let (job, work) = start_active(&sim, &layers, options);
        job.wait_for(|status| status == Status::Ready).await;
        job.complete().unwrap();
        assert_eq!(failed_with(&work.await), Some(ErrorKind::Io));
        assert!(!layers.is_pivoted());
        layers.check_all().await;
        layers.write(0..1024, 5).await.unwrap();
    });
}

#[test]
fn a_guest_that_never_stops_writing_does_not_keep_it_from_ending() {
    with_layers(|sim, layers| async move {
        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        let writer = {
            let (layers, job) = (layers.clone(), job.clone());
            sim.spawn("writer", async move {
                let mut n = 0;
                while !job.status().is_over() {
                    n += 1;
                    let at = layers.sim.rng().range(0..SIZE / 1024) * 1024;
                    layers.write(at..at + 1024, n as u8).await.unwrap();
                }
            })
        };
        job.wait_for(|status| status == Status::Ready).await;
        job.complete().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        writer.await;
        layers.lose_upper_layers();
        layers.check_all().await;
    });
}

#[test]
fn changes_of_the_same_bytes_gather_and_an_idle_job_is_not_busy() {
    with_layers(|sim, layers| async move {
        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        job.wait_for(|status| status == Status::Ready).await;
        let written = layers.file.started(Op::Write);
        sim.sleep(Duration::from_secs(1)).await;
        assert!(!job.is_busy());
        for tag in 0..100 {
            layers.write(0..1024, tag).await.unwrap();
        }
        sim.sleep(Duration::from_secs(1)).await;
        assert!(layers.file.started(Op::Write) - written <= 5);
        job.complete().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        layers.check_all().await;
    });
}

#[test]
fn the_speed_holds_while_guests_run_and_does_not_hold_them_back() {
    with_layers(|sim, layers| async move {
        layers.write(8192..16384, 4).await.unwrap();
        let options = MirrorOptions { speed: 4096, ..active_options(&layers) };
        let (job, work) = start_active(&sim, &layers, options);
        job.wait_for(|status| status == Status::Ready).await;
        let took = headwater_block::Clock::now(&*sim.clock());
        assert!(took >= Duration::from_secs(2), "12 KiB at 4 KiB a second: {took:?}");
        layers.write(24 << 10..26 << 10, 5).await.unwrap();
        job.set_speed(1).unwrap();
        job.request_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled));
    });
}

#[test]
fn the_size_stays_while_a_disk_is_followed() {
    with_layers(|sim, layers| async move {
        let (job, work) = start_active(&sim, &layers, active_options(&layers));
        job.wait_for(|status| status == Status::Ready).await;
        assert_eq!(layers.disk.resize(SIZE * 2).await.unwrap_err().kind(), ErrorKind::InUse);
        job.request_cancel().unwrap();
        assert!(matches!(work.await, Outcome::Cancelled));
        assert_ne!(layers.disk.resize(SIZE * 2).await.unwrap_err().kind(), ErrorKind::InUse);
    });
}

#[test]
fn a_mirror_copies_what_its_mode_says() {
    for (sync, copied) in [(SyncMode::Full, SIZE - 4096), (SyncMode::Top, 1024), (SyncMode::None, 0)] {
        let sim = Sim::new(7);
        let layers = Layers::plain(&sim, &Shape { middles: 1, ..Shape::plain(SIZE) });
        layers.middles[0].preset(16384..20480, None);
        layers.model.begin(16384..20480, Fill::Zero).done();
        let layers = Rc::new(layers.with_target_beside(None));
        let inner = sim.clone();
        sim.run(async move {
            layers.write(0..1024, 3).await.unwrap();
            let options = MirrorOptions { sync, finish: None, ..active_options(&layers) };
            let (job, work) = mirror(layers.disk.clone(), layers.target.clone(), options);
            let work = inner.spawn("job", work);
            job.wait_for(|status| status == Status::Ready).await;
            assert_eq!(job.progress().copied, copied, "{sync:?}");
            job.complete().unwrap();
            assert!(matches!(work.await, Outcome::Completed));
            if sync == SyncMode::Full {
                layers.check_copy().await;
            }
        });
    }
}

#[test]
fn a_mirror_needs_another_disk_of_the_same_size() {
    with_layers(|sim, layers| async move {
        let other = SimFile::new(&sim, "other", Pages::new(SIZE / 2, 512));
        let other = Disk::new(other, sim.clock(), DiskOptions::default());
        for target in [other, layers.disk.clone()] {
            let (_, work) = mirror(layers.disk.clone(), target, MirrorOptions::default());
            assert_eq!(failed_with(&sim.spawn("job", work).await), Some(ErrorKind::InvalidInput));
        }
    });
}

#[test]
fn an_ignored_error_is_tried_again_and_one_that_stays_ends_the_job() {
    with_layers(|sim, layers| async move {
        layers.file.fail(Fault::nth(&[Op::Write], 0, ErrorKind::Io));
        let options = CommitOptions { on_error: OnError::Ignore, ..commit_options() };
        let (job, work) = start_commit(&sim, &layers, options);
        assert!(matches!(work.await, Outcome::Completed));
        let mut actions = Vec::new();
        while let Some(event) = job.try_event() {
            if let Event::Error { action, .. } = event {
                actions.push(action);
            }
        }
        assert_eq!(actions, [Action::Ignore]);

        layers.file.fail(Fault::always(&[Op::Write], ErrorKind::Io));
        let options = CommitOptions {
            on_error: OnError::Ignore,
            finish: Some(layers.drop_below(&layers.top)),
            ..commit_options()
        };
        let (_, work) = start_commit(&sim, &layers, options);
        assert_eq!(failed_with(&work.await), Some(ErrorKind::Io));
        assert!(layers.top.links().is_empty());
        layers.repair();
        layers.check_all().await;
    });
}
