//! What is asked for ahead, its readers and whatever can go wrong, in virtual time and at random: nothing is lost, mixed up, or kept for ever.

use super::*;
use futures_util::future::{Either, select};
use headwater_block::{Error, ErrorKind, LocalFuture};
use headwater_sim::{Sim, for_seeds};
use std::pin::pin;
use std::sync::LazyLock;
use tokio::task::{LocalSet, spawn_local};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 12 * MIB;
const KEEP: Duration = Duration::from_secs(10);

/// What the object holds; each byte tells where it is.
static BYTES: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..SIZE).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect());

fn bytes(range: &Range<u64>) -> &'static [u8] {
    &BYTES[range.start as usize..range.end as usize]
}

fn len(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// An object at the end of a line that may be bad.
struct Object {
    sim: Sim,
    /// One in so many requests fails, or takes very long; 0 is none.
    bad: u64,
    /// From now on it is another one.
    changed: Cell<bool>,
    /// How often each block of [`LEAST`] was asked for.
    asked: RefCell<Vec<u32>>,
    under_way: Cell<u32>,
}

/// A request that is under way.
struct UnderWay<'a>(&'a Cell<u32>);

impl<'a> UnderWay<'a> {
    fn new(count: &'a Cell<u32>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Object {
    fn new(sim: &Sim, bad: u64) -> Rc<Self> {
        let asked = RefCell::new(vec![0; (SIZE / LEAST) as usize]);
        Rc::new(Self { sim: sim.clone(), bad, changed: Cell::new(false), asked, under_way: Cell::new(0) })
    }

    /// Whatever a request takes. False if it fails.
    async fn answers(&self) -> bool {
        let is_bad = self.bad > 0 && self.sim.rng().one_in(self.bad);
        let most = if is_bad && self.sim.rng().one_in(2) { 30_000 } else { 100 };
        self.sim.sleep(self.sim.rng().duration(Duration::ZERO, Duration::from_millis(most))).await;
        if self.sim.rng().one_in(3) {
            self.sim.yield_now().await;
        }
        !is_bad && !self.changed.get()
    }

    /// The answer to a request for `range` that was made before anybody knew the object.
    fn coming(self: &Rc<Self>, range: Range<u64>) -> Coming {
        let (this, asked) = (self.clone(), range.clone());
        self.count(&range);
        let data = Box::pin(async move {
            let _under_way = UnderWay::new(&this.under_way);
            this.answers().await.then(|| Buffer::copy_of(bytes(&asked)))
        });
        Coming { range, data }
    }

    fn count(&self, range: &Range<u64>) {
        let blocks = (range.start / LEAST) as usize..range.end.div_ceil(LEAST) as usize;
        self.asked.borrow_mut()[blocks].iter_mut().for_each(|count| *count += 1);
    }
}

impl RangeSource for Object {
    fn size(&self) -> u64 {
        SIZE
    }

    fn marks(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn fetch(&self, offset: u64, mut buf: BufferMut) -> LocalFuture<'_, Result<BufferMut>> {
        let range = offset..offset + buf.len() as u64;
        assert!(range.end <= SIZE && len(&range) <= PIECE as u64, "{range:?}");
        self.count(&range);
        Box::pin(async move {
            let _under_way = UnderWay::new(&self.under_way);
            if self.answers().await {
                buf.copy_from_slice(bytes(&range));
                return Ok(buf);
            }
            let kind = if self.changed.get() { ErrorKind::SourceChanged } else { ErrorKind::Unavailable };
            Err(Error::new(kind, "no"))
        })
    }

    fn close(&self) {}
}

/// Runs a test in virtual time. What is spawned runs there as well.
fn in_virtual_time<F: Future<Output = ()> + 'static>(
    seed: u64,
    bad: u64,
    test: impl FnOnce(Sim, Rc<Object>, Rc<Ahead>) -> F,
) {
    let sim = Sim::new(seed);
    let object = Object::new(&sim, bad);
    let ahead = Ahead::new(object.clone(), sim.clock(), KEEP);
    let test = test(sim.clone(), object, ahead);
    sim.run(async move { LocalSet::new().run_until(test).await });
}

fn kept(ahead: &Ahead) -> u64 {
    ahead.parts.borrow().iter().map(|part| len(&part.range)).sum()
}

/// What somebody asks for before the object is known: parts that differ.
fn come(object: &Rc<Object>, ahead: &Rc<Ahead>, most: u64) -> u64 {
    let first = object.sim.rng().range(0..most / LEAST) * LEAST;
    let parts: Vec<_> = parts(0..first, 8).collect();
    let end = parts.last().map_or(0, |part| part.end);
    ahead.comes(parts.into_iter().map(|range| object.coming(range)));
    end
}

#[test]
fn what_is_read_once_is_asked_for_once() {
    for_seeds(60, |seed| {
        in_virtual_time(seed, 0, |sim, object, ahead| async move {
            let known = come(&object, &ahead, 8 * MIB);
            if sim.rng().one_in(4) {
                sim.sleep(Duration::from_millis(sim.rng().range(0..200))).await;
            }
            ahead.ask(0..SIZE, sim.rng().range(1..8) as u32);
            let asked = kept(&ahead);
            assert!(asked >= known && asked <= SIZE);
            // Readers that share the object, in whole blocks, at any time.
            let mut at = 0;
            let mut readers = Vec::new();
            while at < SIZE {
                let end = SIZE.min(at + sim.rng().range(1..PIECE as u64 / LEAST) * LEAST);
                let (sim, ahead, range) = (sim.clone(), ahead.clone(), at..end);
                readers.push(spawn_local(async move {
                    sim.sleep(Duration::from_millis(sim.rng().range(0..9000))).await;
                    let data = ahead.fetch(range.start, BufferMut::new(len(&range) as usize)).await.unwrap();
                    assert!(data[..] == *bytes(&range), "{range:?}");
                }));
                at = end;
            }
            for reader in readers {
                reader.await.unwrap();
            }
            assert!(object.asked.borrow().iter().all(|count| *count == 1));
            assert_eq!(kept(&ahead), 0, "nothing is kept that was read");
            // Then another one may ask.
            ahead.ask(0..MIB, 1);
            assert_eq!(kept(&ahead), LEAST.max(MIB.min(PIECE as u64)));
        });
    });
}

/// What happened in all seeds together, so that the test is about something.
#[derive(Default)]
struct Happened {
    right: Cell<u32>,
    failed: Cell<u32>,
    changed: Cell<u32>,
    left: Cell<u32>,
    forgotten: Cell<u32>,
}

fn add(to: &Cell<u32>) {
    to.set(to.get() + 1);
}

#[test]
fn readers_get_the_objects_bytes_or_an_error_whatever_happens() {
    let happened = Rc::<Happened>::default();
    for_seeds(150, |seed| {
        let happened = happened.clone();
        let bad = [0, 2, 5, 20][seed as usize % 4];
        in_virtual_time(seed, bad, |sim, object, ahead| async move {
            come(&object, &ahead, 8 * MIB);
            let requests = sim.rng().range(1..9);
            let bound = 8 * MIB + 2 * requests * PIECE as u64;
            let mut tasks = Vec::new();
            for _ in 0..6 {
                let (sim, object, ahead) = (sim.clone(), object.clone(), ahead.clone());
                let happened = happened.clone();
                tasks.push(spawn_local(async move {
                    for _ in 0..10 {
                        sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(500))).await;
                        let range = sim.rng().byte_range(SIZE, PIECE as u64, 1);
                        if range.is_empty() {
                            continue;
                        }
                        read_or_leave(&sim, &object, &ahead, range, &happened).await;
                        assert!(kept(&ahead) <= bound, "{}", kept(&ahead));
                    }
                }));
            }
            let (other, object_there, ahead_there) = (sim.clone(), object.clone(), ahead.clone());
            let what_happened = happened.clone();
            tasks.push(spawn_local(async move {
                for _ in 0..6 {
                    other.sleep(other.rng().duration(Duration::ZERO, Duration::from_secs(1))).await;
                    match other.rng().range(0..12) {
                        0 => {
                            ahead_there.forget();
                            add(&what_happened.forgotten);
                        }
                        1 => object_there.changed.set(true),
                        _ => {
                            let start = other.rng().range(0..SIZE);
                            ahead_there.ask(start..SIZE, requests as u32);
                        }
                    }
                }
            }));
            for task in tasks {
                task.await.unwrap();
            }
            // What nobody reads goes by itself: after the longest answer, and its time.
            sim.sleep(Duration::from_secs(31) + KEEP).await;
            assert_eq!((kept(&ahead), object.under_way.get()), (0, 0));
            ahead.ask(0..SIZE, requests as u32);
            sim.yield_now().await;
            drop(ahead);
            sim.sleep(Duration::from_millis(1)).await;
            assert_eq!((Rc::strong_count(&object), object.under_way.get()), (1, 0), "no task is left");
        });
    });
    let Happened { right, failed, changed, left, forgotten } = &*happened;
    for (what, count) in [right, failed, changed, left, forgotten].iter().enumerate() {
        assert!(count.get() > 0 || std::env::var("HEADWATER_SEED").is_ok(), "{what} never happened");
    }
}

/// Reads `range`, or leaves before that is done.
async fn read_or_leave(sim: &Sim, object: &Object, ahead: &Ahead, range: Range<u64>, happened: &Happened) {
    let read = ahead.fetch(range.start, BufferMut::new(len(&range) as usize));
    let most = if sim.rng().one_in(3) { 80 } else { 1_000_000 };
    let leaves = sim.sleep(sim.rng().duration(Duration::ZERO, Duration::from_millis(most)));
    match select(pin!(read), pin!(leaves)).await {
        Either::Left((Ok(data), _)) => {
            assert!(data[..] == *bytes(&range), "{range:?}");
            add(&happened.right);
        }
        Either::Left((Err(error), _)) if error.kind() == ErrorKind::SourceChanged => {
            assert!(object.changed.get());
            add(&happened.changed);
        }
        Either::Left((Err(error), _)) => {
            assert!(object.bad > 0 && error.kind() == ErrorKind::Unavailable, "{error}");
            add(&happened.failed);
        }
        Either::Right(_) => add(&happened.left),
    }
}
