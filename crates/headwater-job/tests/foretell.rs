//! What a source that is far away is told before a job reads it.

#![expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is compared")]

use headwater_block::{BufferMut, Disk, DiskOptions, ErrorKind, Limits, Node, SharedLimiter};
use headwater_job::window::Bounds;
use headwater_job::{
    BackupOptions, BootTrace, CommitOptions, JobHandle, MirrorOptions, Outcome, Status, StreamOptions,
    SyncMode, backup, commit, mirror, stream,
};
use headwater_sim::{Fault, Op, Pages, Sim, SimFile, SimFilter, SimOverlay};
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 40 * MIB;
const UNIT: u32 = 64 << 10;
const START: u64 = Bounds::REMOTE.start;

/// A disk that lacks all of a source behind a filter, with a layer in between.
struct Far {
    sim: Sim,
    source: Rc<SimFile>,
    middle: Rc<SimOverlay>,
    top: Rc<SimOverlay>,
    disk: Rc<Disk>,
}

impl Far {
    fn new(remote: bool) -> Self {
        let sim = Sim::new(3);
        let mut pages = Pages::new(SIZE, UNIT as usize);
        for at in (0..SIZE).step_by(MIB as usize) {
            pages.write(at, &[1; MIB as usize]);
        }
        let source = SimFile::new(&sim, "source", pages);
        source.set_limits(Limits { remote, ..Limits::default() });
        let below = Disk::new(source.clone(), sim.clock(), DiskOptions::default());
        let below = SimFilter::new(&sim, "filter", below);
        let middle = SimOverlay::new(&sim, "middle", SIZE, UNIT, 512, Some(below));
        let top = SimOverlay::new(&sim, "top", SIZE, UNIT, 512, Some(middle.clone()));
        let disk = Disk::new(top.clone(), sim.clock(), DiskOptions::default());
        Self { sim, source, middle, top, disk }
    }

    /// What the source was told before it was read by a job that completes.
    fn told(self, job: impl AsyncFnOnce(&Self) -> Outcome + 'static) -> Vec<Range<u64>> {
        let sim = self.sim.clone();
        sim.run(async move {
            let outcome = job(&self).await;
            assert!(matches!(outcome, Outcome::Completed), "{outcome:?}");
            assert!(self.source.most_reads(0..SIZE) > 0);
            self.source.expected(false)
        })
    }

    /// The same of a stream.
    fn told_by_stream(self, options: StreamOptions) -> Vec<Range<u64>> {
        self.told(async move |far| stream(far.disk.clone(), options).1.await)
    }
}

fn fill(layer: &SimOverlay, range: Range<u64>) {
    let data = vec![7; (range.end - range.start) as usize];
    layer.preset(range, Some(&data));
}

#[test]
fn a_stream_tells_of_the_beginning_of_what_no_nearer_layer_holds() {
    assert_eq!(Far::new(true).told_by_stream(StreamOptions::default()), [0..START]);
    let told = Far::new(true).told(async |far| {
        fill(&far.top, 0..MIB);
        fill(&far.middle, MIB..3 * MIB);
        fill(&far.middle, 9 * MIB..10 * MIB);
        stream(far.disk.clone(), StreamOptions::default()).1.await
    });
    assert_eq!(told, [3 * MIB..9 * MIB]);
    // Where the first window lacks nothing, nothing comes of the source soon.
    let told = Far::new(true).told(async |far| {
        fill(&far.top, 0..START);
        stream(far.disk.clone(), StreamOptions::default()).1.await
    });
    assert_eq!(told, [0..0]);
    assert_eq!(
        Far::new(false).told_by_stream(StreamOptions::default()),
        [],
        "a near one isn't told anything"
    );
}

#[test]
fn a_job_that_is_limited_or_has_another_order_has_connections_made_at_most() {
    let slow = StreamOptions { speed: 100 * MIB, ..StreamOptions::default() };
    assert_eq!(Far::new(true).told_by_stream(slow), [0..0]);
    let told = Far::new(true).told(async |far| {
        let limit = SharedLimiter::new(100 * MIB, far.sim.clock());
        let (job, work) = stream(far.disk.clone(), StreamOptions::default());
        job.set_share(limit.join(SharedLimiter::DEFAULT_WEIGHT));
        work.await
    });
    assert_eq!(told, [0..0]);
    let trace = BootTrace::parse("headwater boot trace 1\n0 0 4096\n");
    let ordered = StreamOptions { boot_trace: trace.ok(), ..StreamOptions::default() };
    assert!(ordered.boot_trace.is_some());
    assert_eq!(Far::new(true).told_by_stream(ordered), []);
}

#[test]
fn commands_count_before_and_meanwhile() {
    // Paused before it begins.
    let told = Far::new(true).told(async |far| {
        let (job, work) = stream(far.disk.clone(), StreamOptions::default());
        job.pause().unwrap();
        resumed_later(far, &job, work, Duration::ZERO).await
    });
    assert_eq!(told, []);
    // While a layer doesn't say what it holds.
    let told = Far::new(true).told(async |far| {
        far.top.stall(&[Op::Status]);
        let (job, work) = stream(far.disk.clone(), StreamOptions::default());
        let pause = Duration::from_secs(1);
        far.sim.spawn("pause", {
            let (sim, job) = (far.sim.clone(), job.clone());
            async move {
                sim.sleep(pause).await;
                job.pause().unwrap();
            }
        });
        resumed_later(far, &job, work, 2 * pause).await
    });
    assert_eq!(told, []);
    // A layer that fails is the job's to meet.
    let far = Far::new(true);
    let sim = far.sim.clone();
    sim.run(async move {
        far.top.fail(Fault::always(&[Op::Status], ErrorKind::Io));
        let outcome = stream(far.disk.clone(), StreamOptions::default()).1.await;
        assert!(matches!(&outcome, Outcome::Failed(error) if error.kind() == ErrorKind::Io), "{outcome:?}");
        assert_eq!(far.source.expected(false), []);
    });
}

/// Drives a job, which is seen to be paused by the moment `paused`, and resumed then.
async fn resumed_later(
    far: &Far,
    job: &JobHandle,
    work: impl Future<Output = Outcome> + 'static,
    paused: Duration,
) -> Outcome {
    let work = far.sim.spawn("job", work);
    far.sim.sleep(paused + Duration::from_secs(1)).await;
    assert_eq!((job.is_paused(), far.source.most_reads(0..SIZE)), (true, 0));
    far.top.release();
    job.resume().unwrap();
    work.await
}

#[test]
fn copies_to_other_disks_tell_as_well() {
    let other = |far: &Far| {
        let file = SimFile::new(&far.sim, "target", Pages::new(SIZE, UNIT as usize));
        Disk::new(file, far.sim.clock(), DiskOptions::default())
    };
    let told = Far::new(true).told(async move |far| {
        let (job, work) = mirror(far.disk.clone(), other(far), MirrorOptions::default());
        let work = far.sim.spawn("mirror", work);
        job.wait_for(|status| status == Status::Ready).await;
        job.complete().unwrap();
        work.await
    });
    assert_eq!(told, [0..START]);
    let told = Far::new(true).told(async move |far| {
        fill(&far.top, 0..MIB);
        let point = far.disk.begin_point_in_time(&other(far), u64::from(UNIT), None).await;
        backup(point, BackupOptions::default()).1.await
    });
    assert_eq!(told, [MIB..START]);
    // A commit out of an image that is far away.
    let told = Far::new(true).told(async move |far| {
        far.top.data().set_limits(Limits { remote: true, ..far.top.data().limits() });
        fill(&far.top, 0..MIB);
        let base = Disk::new(far.middle.clone(), far.sim.clock(), DiskOptions::default());
        let outcome = commit(far.top.clone(), base, CommitOptions::default()).1.await;
        assert_eq!(far.top.data().expected(false), [0..START]);
        assert!(far.source.most_reads(0..SIZE) == 0 && far.top.data().most_reads(0..SIZE) > 0);
        far.source.read(0, BufferMut::new(1)).await.unwrap();
        outcome
    });
    assert_eq!(told, []);
    // What isn't copied isn't read.
    let top_only = Far::new(true);
    let sim = top_only.sim.clone();
    sim.run(async move {
        let far = top_only;
        let options = MirrorOptions { sync: SyncMode::Top, ..MirrorOptions::default() };
        let (job, work) = mirror(far.disk.clone(), other(&far), options);
        let work = far.sim.spawn("mirror", work);
        job.wait_for(|status| status == Status::Ready).await;
        job.complete().unwrap();
        assert!(matches!(work.await, Outcome::Completed));
        assert_eq!(far.source.expected(false), []);
    });
}
