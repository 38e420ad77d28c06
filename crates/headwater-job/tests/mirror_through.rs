//! The windows of a mirror that guests' changes go through, one test for each.

mod common;

use common::layers::Layers;
use common::{SMALL, Shape};
use headwater_block::ErrorKind;
use headwater_job::{JobHandle, MirrorOptions, OnError, OnErrors, Outcome, Status, mirror};
use headwater_sim::{Fault, Op, Sim, Task};
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

const SIZE: u64 = 16 << 10;

/// Runs a test on a disk that is full, with a target beside it, under a few seeds.
fn with_layers<F: Future<Output = ()> + 'static>(test: impl Fn(Sim, Rc<Layers>) -> F) {
    for seed in 0..25 {
        let sim = Sim::new(seed);
        let layers = Layers::plain(&sim, &Shape::plain(SIZE)).with_target_beside(None);
        sim.run(test(sim.clone(), Rc::new(layers)));
    }
}

fn start(sim: &Sim, layers: &Layers, through: &Rc<Cell<bool>>) -> (JobHandle, Task<Outcome>) {
    let options = MirrorOptions {
        granularity: Some(1024),
        write_through: through.clone(),
        on_error: OnErrors { source: OnError::Report, target: OnError::Stop },
        bounds: Some(SMALL),
        hold_guests: Some(layers.hold_guests()),
        ..MirrorOptions::default()
    };
    let (job, work) = mirror(layers.disk.clone(), layers.target.clone(), options);
    (job, sim.spawn("job", work))
}

/// The device below the target.
fn target_file(layers: &Layers) -> Rc<headwater_sim::SimFile> {
    layers.target_file.clone().expect("the target is beside the chain")
}

fn write(sim: &Sim, layers: &Rc<Layers>, at: u64) -> Task<()> {
    let layers = layers.clone();
    sim.spawn("guest", async move { layers.write(at..at + 1024, 7).await.unwrap() })
}

async fn settle(sim: &Sim) {
    sim.sleep(Duration::from_millis(500)).await;
}

/// The job ends with a copy of what the disk reads as at that moment.
async fn ends_well(job: &JobHandle, work: Task<Outcome>, layers: &Layers) {
    job.wait_for(|status| status == Status::Ready).await;
    job.request_soft_cancel().unwrap();
    assert!(matches!(work.await, Outcome::Completed));
    layers.check_copy().await;
    layers.check_all().await;
}

// race-test: follow-second-look
#[test]
fn a_copy_that_waited_for_a_change_looks_again() {
    with_layers(|sim, layers| async move {
        layers.zero(0..1024, true).await.unwrap();
        let through = Rc::new(Cell::new(true));
        layers.top.data().stall(&[Op::Write]);
        let guest = write(&sim, &layers, 0);
        layers.top.data().holds(1).await;
        let (job, work) = start(&sim, &layers, &through);
        settle(&sim).await;
        layers.top.data().release();
        guest.await;
        ends_well(&job, work, &layers).await;
    });
}

// race-test: follow-passed-on
#[test]
fn a_change_that_goes_through_beside_an_older_copy_is_copied_again() {
    with_layers(|sim, layers| async move {
        let through = Rc::new(Cell::new(false));
        target_file(&layers).stall(&[Op::Write]);
        let (job, work) = start(&sim, &layers, &through);
        target_file(&layers).holds(1).await;
        through.set(true);
        let guest = write(&sim, &layers, 0);
        settle(&sim).await;
        target_file(&layers).release();
        guest.await;
        ends_well(&job, work, &layers).await;
    });
}

#[test]
fn what_went_through_is_in_the_target_when_the_guest_is_answered() {
    with_layers(|sim, layers| async move {
        let through = Rc::new(Cell::new(true));
        let (job, work) = start(&sim, &layers, &through);
        job.wait_for(|status| status == Status::Ready).await;
        job.pause().unwrap();
        settle(&sim).await;
        write(&sim, &layers, 2048).await;
        layers.zero(4096..6000, false).await.unwrap();
        layers.discard(8192..10240).await.unwrap();
        let now = layers.disk.read(0, SIZE).await.unwrap();
        assert!(layers.target.read(0, SIZE).await.unwrap()[..] == now[..], "although the job is paused");
        job.resume().unwrap();
        ends_well(&job, work, &layers).await;
    });
}

#[test]
fn a_change_that_cannot_go_through_succeeds_and_is_copied_later() {
    with_layers(|sim, layers| async move {
        let through = Rc::new(Cell::new(true));
        let (job, work) = start(&sim, &layers, &through);
        job.wait_for(|status| status == Status::Ready).await;
        target_file(&layers).fail(Fault::always(&[Op::Write], ErrorKind::NoSpace));
        write(&sim, &layers, 2048).await;
        job.wait_for(|status| status == Status::Standby).await;
        target_file(&layers).repair();
        job.resume().unwrap();
        ends_well(&job, work, &layers).await;
    });
}
