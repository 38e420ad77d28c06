//! An active commit of one qcow2 image into another among guests, commands and faults. Afterwards the images are closed, checked, and opened
//! again.

mod common;

use common::image::Image;
use common::{Guest, SMALL, Shape, busy, commander, helper, source};
use headwater_block::{Disk, DiskOptions, ErrorKind, Node};
use headwater_image::qcow2::check::{CheckOptions, check};
use headwater_image::qcow2::create::create;
use headwater_job::{MirrorOptions, OnError, Outcome, Status, commit_active};
use headwater_sim::{Fault, Model, Op, Sim, SimFilter, for_seeds};
use std::any::Any;
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::Duration;

#[derive(Debug, Default)]
struct Tally {
    pivoted: u32,
    others: u32,
}

fn one_run(seed: u64, faults: bool, tally: &mut Tally) {
    let sim = Sim::new(seed);
    let inner = sim.clone();
    let pivoted = sim.run(async move { in_sim(inner, faults).await });
    *if pivoted { &mut tally.pivoted } else { &mut tally.others } += 1;
}

async fn in_sim(sim: Sim, faults: bool) -> bool {
    let rng = sim.rng().clone();
    let random = Shape::random(&sim);
    let shape = Shape { size: random.size.next_multiple_of(512), ..random };
    let (source, mut content) = source(&sim, &shape, true);
    // A base that is smaller hides the source past its end.
    let base_size = if rng.one_in(3) { (shape.size / 2).next_multiple_of(512) } else { shape.size };
    content[base_size as usize..].fill(0);
    let (base_image, top_image) = (Image::random(&sim, base_size), Image::random(&sim, shape.size));
    create(&*base_image.file, &base_image.create).await.expect("the base is created");
    create(&*top_image.file, &top_image.create).await.expect("the top is created");
    let base = Disk::new(base_image.open(Some(source.clone())).await, sim.clock(), DiskOptions::default());
    let below = SimFilter::new(&sim, "base", base.clone());
    let disk = Disk::new(top_image.open(Some(below.clone())).await, sim.clock(), shape.options);
    let guest = Guest::new(&sim, disk.clone(), Model::new(&content));
    // Both hold something when it begins.
    busy(guest.clone(), 8).await;

    let mut sick = false;
    if faults {
        sick = rng.one_in(2);
        let (file, ops) = match (sick, rng.one_in(2)) {
            (true, true) => (&base_image.file, [Op::Write, Op::WriteZeroes]),
            (true, false) => (&top_image.file, [Op::Write, Op::WriteZeroes]),
            (false, _) => (&top_image.file, [Op::Read, Op::Read]),
        };
        file.fail(Fault::sometimes(&ops, 0.03, rng.range(1..6), ErrorKind::NoSpace));
    }
    let held: Rc<RefCell<Weak<_>>> = Rc::default();
    let (edge, holding) = (guest.edge.clone(), held.clone());
    let (led, to) = (guest.edge.clone(), base.clone());
    let options = MirrorOptions {
        granularity: Some(*rng.pick(&[512, 4096])),
        on_error: (*rng.pick(&[OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc])).into(),
        bounds: Some(SMALL),
        hold_guests: Some(Box::new(move || {
            let (edge, holding) = (edge.clone(), holding.clone());
            Box::pin(async move {
                let drained = Rc::new(edge.drain().await);
                holding.replace(Rc::downgrade(&drained));
                Box::new(drained) as Box<dyn Any>
            })
        })),
        finish: Some(Box::new(move || {
            Box::pin(async move {
                led.replace(&held.borrow().upgrade().expect("the guests are held back"), to);
                Ok(())
            })
        })),
        ..MirrorOptions::default()
    };
    let (job, work) = commit_active(disk.clone(), base.clone(), options);
    let guests: Vec<_> = (0..3).map(|n| sim.spawn(format!("guest {n}"), busy(guest.clone(), 12))).collect();
    let work = sim.spawn("job", work);
    let _helper = sim.spawn("helper", helper(sim.clone(), job.clone()));
    let commanded = rng.one_in(2).then(|| sim.spawn("commander", commander(guest.clone(), job.clone())));
    job.wait_for(|status| status == Status::Ready || status.is_over()).await;
    sim.sleep(rng.duration(Duration::ZERO, Duration::from_millis(4))).await;
    while !job.status().is_over() && job.complete().is_err() {
        sim.sleep(Duration::from_millis(1)).await;
    }
    let outcome = work.await;
    for guest in guests {
        guest.await;
    }
    if let Some(commanded) = commanded {
        commanded.await;
    }
    base_image.file.repair();
    top_image.file.repair();
    let completed = matches!(outcome, Outcome::Completed);
    assert!(faults || completed, "{outcome:?}");
    let pivoted = Rc::ptr_eq(&guest.edge.disk(), &base);
    assert_eq!(pivoted, completed, "{outcome:?}");
    guest.check_all().await;
    for (disk, image) in [(&disk, &top_image), (&base, &base_image)] {
        let closed = disk.close().await;
        assert!(sick || closed.is_ok(), "{closed:?}");
        let report = check(image.file.clone(), CheckOptions::default()).await.expect("it can be checked");
        assert!(report.corruptions == 0 && (sick || report.leaks == 0), "{}: {report:?}", disk.name());
        if closed.is_err() {
            return pivoted;
        }
    }
    let base = Disk::new(base_image.open(Some(source)).await, sim.clock(), DiskOptions::default());
    let disk = if pivoted {
        base
    } else {
        let below: Rc<dyn Node> = SimFilter::new(&sim, "base", base);
        Disk::new(top_image.open(Some(below)).await, sim.clock(), shape.options)
    };
    Guest::new(&sim, disk, guest.model).check_all().await;
    pivoted
}

#[test]
fn an_active_commit_of_qcow2_into_qcow2_completes() {
    let mut tally = Tally::default();
    for_seeds(150, |seed| one_run(seed, false, &mut tally));
    assert_eq!(tally.others, 0);
}

#[test]
fn an_active_commit_of_qcow2_into_qcow2_with_faults_keeps_every_byte() {
    let mut tally = Tally::default();
    let mut runs = 0;
    for_seeds(200, |seed| {
        runs += 1;
        one_run(seed, true, &mut tally);
    });
    assert!(runs < 100 || (tally.pivoted > runs / 20 && tally.others > runs / 50), "{tally:?} of {runs}");
}
