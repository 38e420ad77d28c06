//! Jobs that share one limit: by their weights, beside their own speeds, and what doesn't count in it.

use headwater_block::share::SharePool;
use headwater_block::{Clock, Disk, DiskOptions, Limits, Node, SharedLimiter};
use headwater_job::{Base, JobHandle, Link, Outcome, StreamOptions, stream};
use headwater_sim::{Device, Op, Pace, Pages, Sim, SimFile, SimOverlay, Task, for_seeds};
use std::rc::Rc;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const UNIT: u32 = 64 << 10;
const SIZE: u64 = 24 * MIB;
const RATE: u64 = 2 * MIB;
const SECOND: Duration = Duration::from_secs(1);

/// A job that streams from a remote source.
struct Streaming {
    disk: Rc<Disk>,
    job: JobHandle,
    over: Task<Outcome>,
}

/// A remote source, of which `data` says where there are bytes.
fn source(sim: &Sim, data: impl Fn(u64) -> bool) -> Rc<SimFile> {
    let mut pages = Pages::new(SIZE, UNIT as usize);
    for at in (0..SIZE).step_by(UNIT as usize).filter(|at| data(*at)) {
        pages.write(at, &[1; UNIT as usize]);
    }
    let source = SimFile::new(sim, "source", pages);
    source.set_limits(Limits { remote: true, ..Limits::default() });
    let link = Pace { least: Duration::from_millis(2), most: Duration::from_millis(20), bandwidth: 0 };
    source.set_pace(link);
    source.set_exact_status();
    source
}

fn start(sim: &Sim, source: Rc<dyn Node>, limiter: &Rc<SharedLimiter>, weight: u32, speed: u64) -> Streaming {
    let top = SimOverlay::new(sim, "top", SIZE, UNIT, 512, Some(source));
    for local in [top.data() as &Device, &top] {
        local.set_pace(Pace { least: Duration::ZERO, most: Duration::ZERO, bandwidth: 0 });
    }
    let disk = Disk::new(top, sim.clock(), DiskOptions::default());
    let (job, work) = stream(disk.clone(), StreamOptions { speed, ..StreamOptions::default() });
    job.set_share(limiter.join(weight));
    Streaming { disk, job, over: sim.spawn("stream", work) }
}

fn run(seed: u64, test: impl AsyncFnOnce(Sim) + 'static) {
    let sim = Sim::new(seed);
    let inner = sim.clone();
    sim.run(async move { test(inner).await });
}

fn copied(streams: &[&Streaming]) -> Vec<u64> {
    streams.iter().map(|stream| stream.job.progress().done).collect()
}

/// What each copies from now on, in some seconds.
async fn rates(sim: &Sim, streams: &[&Streaming], seconds: u32) -> Vec<u64> {
    let before = copied(streams);
    sim.sleep(SECOND * seconds).await;
    copied(streams).iter().zip(before).map(|(now, then)| (now - then) / u64::from(seconds)).collect()
}

#[track_caller]
fn assert_near(got: u64, want: u64) {
    assert!(got.abs_diff(want) <= want / 5 + u64::from(UNIT), "{got}, not about {want}");
}

#[test]
fn jobs_share_a_limit_by_weight_and_keep_to_their_own_speeds() {
    for_seeds(4, |seed| {
        run(seed, async |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let heavy = start(&sim, source(&sim, |_| true), &limiter, 300, 0);
            let light = start(&sim, source(&sim, |_| true), &limiter, 100, 0);
            let slow = start(&sim, source(&sim, |_| true), &limiter, 10_000, RATE / 8);
            let all = [&heavy, &light, &slow];
            sim.sleep(SECOND).await;
            let rest = RATE - RATE / 8;
            let seen = rates(&sim, &all, 6).await;
            assert_near(seen[0], rest * 3 / 4);
            assert_near(seen[1], rest / 4);
            assert_near(seen[2], RATE / 8);
            light.job.set_weight(300).unwrap();
            let seen = rates(&sim, &all, 4).await;
            assert_near(seen[0], rest / 2);
            assert_near(seen[1], rest / 2);

            // Who is paused takes no share, and the others have all of it.
            heavy.job.pause().unwrap();
            sim.sleep(SECOND / 2).await;
            let seen = rates(&sim, &all, 3).await;
            assert_eq!(seen[0], 0);
            assert_near(seen[1], rest);
            assert_near(seen[2], RATE / 8);
            heavy.job.resume().unwrap();
            let Ok(Outcome::Cancelled) = light.job.cancel().await else { panic!("it can be cancelled") };
            let seen = rates(&sim, &all, 2).await;
            assert_near(seen[0], rest);

            limiter.set_rate(0);
            for stream in [heavy, slow] {
                stream.job.set_speed(0).unwrap();
                assert!(matches!(stream.over.await, Outcome::Completed));
            }
        });
    });
}

#[test]
fn nobody_waits_for_a_job_that_waits_for_its_share() {
    for_seeds(8, |seed| {
        run(seed, async move |sim| {
            let limiter = SharedLimiter::new(1, sim.clock());
            let source = source(&sim, |_| true);
            let streams = [300, 100].map(|weight| start(&sim, source.clone(), &limiter, weight, 0));
            sim.sleep(SECOND * 2).await;
            // What may pass at once has passed, and the next copy would for hours.
            let [one, other] = &streams;
            let since = sim.clock().now();
            for stream in [one, other] {
                let copied = stream.job.progress().done;
                drop(stream.disk.drain().await);
                stream.disk.read(SIZE - 4096, 4096).await.unwrap();
                stream.job.pause().unwrap();
                stream.job.wait_for(|status| status == headwater_job::Status::Paused).await;
                stream.job.resume().unwrap();
                // It looks for what is missing anew.
                sim.sleep(SECOND / 5).await;
                assert!(!stream.job.is_busy(), "nothing is under way");
                assert_eq!(stream.job.progress().done, copied);
            }
            assert!(matches!(one.job.cancel().await, Ok(Outcome::Cancelled)));
            assert!(sim.clock().now() - since < SECOND, "{:?}", sim.clock().now() - since);
            // The new limit counts for who waits.
            limiter.set_rate(SIZE / 4);
            assert!(matches!(other.job.wait().await, Outcome::Completed));
            let took = sim.clock().now() - since;
            assert!(took > SECOND * 3 && took < SECOND * 5, "{took:?}");
        });
    });
}

#[test]
fn holes_and_zeroes_do_not_count() {
    for_seeds(10, |seed| {
        run(seed, async |sim| {
            let limiter = SharedLimiter::new(MIB, sim.clock());
            // Two megabytes here and there.
            let source = source(&sim, |at| at % (12 * u64::from(UNIT)) == 0);
            let stream = start(&sim, source, &limiter, 100, 0);
            assert!(matches!(stream.over.await, Outcome::Completed));
            let took = sim.clock().now();
            assert!(took < SECOND * 5 / 2 && took > SECOND * 3 / 2, "{took:?}");
        });
    });
}

/// Where something else lies below a base, zeroes must be written; nothing is read for them.
#[test]
fn zeroes_over_a_base_do_not_count() {
    for_seeds(10, |seed| {
        run(seed, async |sim| {
            let limiter = SharedLimiter::new(MIB, sim.clock());
            let base: Rc<dyn Node> = source(&sim, |_| true);
            let middle = SimOverlay::new(&sim, "middle", SIZE, UNIT, 512, Some(base.clone()));
            middle.preset(0..SIZE - 2 * MIB, None);
            middle.preset(SIZE - 2 * MIB..SIZE, Some(&[2; 2 * MIB as usize]));
            let top = SimOverlay::new(&sim, "top", SIZE, UNIT, 512, Some(middle));
            let disk = Disk::new(top, sim.clock(), DiskOptions::default());
            let link = Link { name: "source".to_string(), format: "sim".to_string() };
            let options = StreamOptions { base: Some(Base { node: base, link }), ..StreamOptions::default() };
            let (job, work) = stream(disk, options);
            job.set_share(limiter.join(100));
            assert!(matches!(work.await, Outcome::Completed));
            let took = sim.clock().now();
            assert!(took < SECOND * 7 / 2 && took > SECOND * 3 / 2, "{took:?}");
        });
    });
}

#[test]
fn what_disks_share_of_a_source_counts_once() {
    for_seeds(3, |seed| {
        run(seed, async |sim| {
            let limiter = SharedLimiter::new(4 * MIB, sim.clock());
            let source = source(&sim, |_| true);
            source.set_read_only(true);
            let shared = SharePool::new(64 * MIB).join(source.clone(), None, None);
            shared.set_readers(5);
            let streams: Vec<_> = (0..5).map(|_| start(&sim, shared.clone(), &limiter, 100, 0)).collect();
            for stream in streams {
                assert!(matches!(stream.over.await, Outcome::Completed));
            }
            // As one would have taken, or a little longer, because turns are taken by those that are behind, too.
            let (took, alone) = (sim.clock().now(), SECOND * 6);
            assert!(took > alone * 9 / 10 && took < alone * 13 / 10, "{took:?}");
            assert!(source.bytes(Op::Read) <= SIZE * 11 / 10);
        });
    });
}

#[test]
fn a_limit_that_changes_suddenly_counts_at_once_for_all_jobs() {
    for_seeds(4, |seed| {
        run(seed, async |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let heavy = start(&sim, source(&sim, |_| true), &limiter, 300, 0);
            let light = start(&sim, source(&sim, |_| true), &limiter, 100, 0);
            let all = [&heavy, &light];
            sim.sleep(SECOND).await;
            for (rate, seconds) in [(RATE, 2), (RATE / 8, 4), (1, 4), (2 * RATE, 3), (RATE, 2)] {
                limiter.set_rate(rate);
                // What had leave by then is copied still.
                sim.sleep(Duration::from_millis(300)).await;
                let seen = rates(&sim, &all, seconds).await;
                if rate == 1 {
                    assert_eq!(seen, [0, 0]);
                    continue;
                }
                assert_near(seen[0], rate * 3 / 4);
                assert_near(seen[1], rate / 4);
            }
            limiter.set_rate(0);
            for stream in [heavy, light] {
                assert!(matches!(stream.over.await, Outcome::Completed));
            }
        });
    });
}

#[test]
fn a_job_that_is_stuck_leaves_the_limit_to_the_others() {
    for_seeds(4, |seed| {
        run(seed, async |sim| {
            let limiter = SharedLimiter::new(RATE, sim.clock());
            let nothing_comes = source(&sim, |_| true);
            nothing_comes.stall(&[Op::Read]);
            let stuck = start(&sim, nothing_comes.clone(), &limiter, 300, 0);
            let well = start(&sim, source(&sim, |_| true), &limiter, 100, 0);
            // It asks for as much as it may have in flight, and then for nothing more.
            let seen = rates(&sim, &[&well], 10).await;
            assert_near(seen[0], RATE / 4);
            sim.sleep(7 * SECOND).await;
            let seen = rates(&sim, &[&well, &stuck], 4).await;
            assert_near(seen[0], RATE);
            assert_eq!(seen[1], 0);
            limiter.set_rate(RATE / 2);
            sim.sleep(SECOND / 2).await;
            let seen = rates(&sim, &[&well], 4).await;
            assert_near(seen[0], RATE / 2);
            nothing_comes.release();
            for stream in [stuck, well] {
                assert!(matches!(stream.over.await, Outcome::Completed));
            }
        });
    });
}
