//! The stream job on qcow2 images in the simulator: every shape of image, guests, commands and faults. Afterwards the image is
//! closed, checked, and opened again.

mod common;

use common::image::Image;
use common::{Guest, Shape, base, busy, commander, helper, preset, small_options, source};
use headwater_block::{Disk, ErrorKind, Node};
use headwater_image::qcow2::check::{CheckOptions, check};
use headwater_image::qcow2::create::create;
use headwater_job::{OnError, Outcome, StreamOptions, stream};
use headwater_sim::{Fault, Model, Op, Sim, SimOverlay, for_seeds};
use std::rc::Rc;
use std::time::Duration;

fn one_run(seed: u64, faults: bool) {
    let sim = Sim::new(seed);
    let inner = sim.clone();
    sim.run(async move { in_sim(inner, faults).await });
}

async fn in_sim(sim: Sim, faults: bool) {
    let rng = sim.rng().clone();
    let random = Shape::random(&sim);
    let shape = Shape { size: random.size.next_multiple_of(512), ..random };
    let (source, mut content) = source(&sim, &shape, true);
    let mut below: Rc<dyn Node> = source.clone();
    let mut middle = None;
    if shape.middles > 0 {
        let layer = SimOverlay::new(&sim, "middle", shape.size, 2048, 512, Some(source.clone()));
        preset(&sim, &layer, shape.size, 2048, 2, &mut content);
        below = layer.clone();
        middle = Some(layer);
    }
    let keeps_source = middle.is_some() && rng.one_in(3);
    let base = keeps_source.then(|| base(&(source.clone() as Rc<dyn Node>)));
    let image = Image::random(&sim, shape.size);
    create(&*image.file, &image.create).await.expect("the image is created");
    let top = image.open(Some(below)).await;
    let disk = Disk::new(top.clone(), sim.clock(), shape.options);
    let guest = Guest::new(&sim, disk.clone(), Model::new(&content));

    let mut sick = false;
    if faults {
        let times = rng.range(1..6);
        if rng.one_in(2) {
            source.fail(Fault::sometimes(&[Op::Read, Op::Status], 0.1, times, ErrorKind::Unavailable));
        } else {
            sick = true;
            image.file.fail(Fault::sometimes(&[Op::Write, Op::WriteZeroes], 0.02, times, ErrorKind::NoSpace));
        }
    }
    let options = StreamOptions {
        base,
        speed: if rng.one_in(4) { rng.range(1 << 20..100 << 20) } else { 0 },
        on_error: *rng.pick(&[OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc]),
        detect_zeroes: rng.one_in(2),
        ..small_options()
    };
    let (job, work) = stream(disk.clone(), options);
    let guests: Vec<_> = (0..3).map(|n| sim.spawn(format!("guest {n}"), busy(guest.clone(), 12))).collect();
    let work = sim.spawn("job", work);
    let _helper = sim.spawn("helper", helper(sim.clone(), job.clone()));
    let commanded = rng.one_in(2).then(|| sim.spawn("commander", commander(guest.clone(), job.clone())));
    if faults && rng.one_in(3) {
        sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(8))).await;
        let _too_late = job.request_cancel();
    }
    let outcome = work.await;
    for guest in guests {
        guest.await;
    }
    if let Some(commanded) = commanded {
        commanded.await;
    }
    source.repair();
    image.file.repair();
    assert!(faults || matches!(outcome, Outcome::Completed), "{outcome:?}");
    let completed = matches!(outcome, Outcome::Completed);
    let expected = match (completed, keeps_source) {
        (true, true) => Some("source"),
        (true, false) => None,
        (false, _) => Some(if middle.is_some() { "middle" } else { "source" }),
    };
    assert_eq!(top.backing().as_ref().map(|node| node.name()), expected, "{outcome:?}");
    // What is no longer below may vanish.
    let gone = Fault::always(&[Op::Read, Op::Status], ErrorKind::Io);
    if completed && !keeps_source {
        source.fail(gone.clone());
    }
    if let (true, Some(middle)) = (completed, &middle) {
        middle.fail(gone);
    }
    guest.check_all().await;
    let closed = disk.close().await;
    assert!(sick || closed.is_ok(), "{closed:?}");

    let report = check(image.file.clone(), CheckOptions::default()).await.expect("the image can be checked");
    assert!(report.corruptions == 0 && (sick || report.leaks == 0), "{report:?}");
    if closed.is_ok() {
        let top = image.open(top.backing()).await;
        assert_eq!(top.header().backing_name.is_none(), expected.is_none(), "{outcome:?}");
        let disk = Disk::new(top, sim.clock(), shape.options);
        Guest::new(&sim, disk, guest.model).check_all().await;
    }
}

#[test]
fn a_stream_into_qcow2_among_guests_completes() {
    for_seeds(150, |seed| one_run(seed, false));
}

#[test]
fn a_stream_into_qcow2_with_faults_keeps_every_byte() {
    for_seeds(250, |seed| one_run(seed, true));
}
