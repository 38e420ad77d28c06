//! Who gets what was asked for ahead, against a source that counts.

use super::*;
use headwater_block::{Error, ErrorKind, LocalFuture, TokioClock};
use tokio::task::LocalSet;

const SIZE: u64 = 8 << 20;

fn byte(at: u64) -> u8 {
    (at / 7 % 251) as u8
}

/// How long each request takes, and how long what nobody reads is kept.
const TIMES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(400));

/// A source, and what was asked of it.
#[derive(Default)]
struct Counted {
    asked: RefCell<Vec<Range<u64>>>,
    /// So many requests fail from now on.
    fails: Cell<u32>,
}

impl RangeSource for Counted {
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
        self.asked.borrow_mut().push(offset..offset + buf.len() as u64);
        let fails = self.fails.get() > 0;
        self.fails.set(self.fails.get().saturating_sub(1));
        Box::pin(async move {
            tokio::time::sleep(TIMES.0).await;
            if fails {
                return Err(Error::new(ErrorKind::Unavailable, "no"));
            }
            buf.iter_mut().zip(offset..).for_each(|(to, at)| *to = byte(at));
            Ok(buf)
        })
    }

    fn close(&self) {}
}

fn run(test: impl AsyncFnOnce(Rc<Counted>, Rc<Ahead>)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    LocalSet::new().block_on(&runtime.unwrap(), async {
        let source = Rc::<Counted>::default();
        let ahead = Ahead::new(source.clone(), Rc::new(TokioClock::new()), TIMES.1);
        test(source, ahead).await;
    });
}

async fn reads(ahead: &Ahead, range: Range<u64>) {
    let buf = ahead.fetch(range.start, BufferMut::new((range.end - range.start) as usize)).await.unwrap();
    let right = buf.iter().zip(range.clone()).all(|(found, at)| *found == byte(at));
    assert!(right && buf.len() as u64 == range.end - range.start, "{range:?}");
}

#[test]
fn parts_cover_what_was_asked_for_and_differ_in_size() {
    for (range, count) in
        [(0..32 << 20, 16), (65536..5 << 20, 16), (0..1, 1), (7..3 << 20, 256), (0..64 << 20, 4)]
    {
        let all: Vec<_> = parts(range.clone(), count).collect();
        assert!(all.len() <= count as usize);
        assert_eq!(all[0].start, range.start);
        assert!(all.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(all.iter().all(|part| !part.is_empty() && part.end - part.start <= PIECE as u64));
        assert!(all.last().unwrap().end <= range.end);
        let grows = |pair: &[Range<u64>]| pair[0].end - pair[0].start <= pair[1].end - pair[1].start;
        assert!(all[..all.len() - 1].windows(2).all(grows), "{all:?}");
    }
    let all: Vec<_> = parts(0..32 << 20, 16).collect();
    assert_eq!((all.len(), all[15].end - all[15].start), (16, PIECE as u64));
}

#[test]
fn what_was_asked_for_is_not_asked_for_again() {
    run(async |source, ahead| {
        ahead.ask(0..4 << 20, 8);
        tokio::task::yield_now().await;
        let asked = source.asked.borrow().clone();
        let end = asked.last().unwrap().end;
        assert!(asked.len() > 1 && end <= 4 << 20, "{asked:?}");
        // Readers come before it does, across parts and past their end.
        let reading = [0..1000, 1000..end - 10, end - 10..end + 5000];
        join_all(reading.map(|range| reads(&ahead, range))).await;
        let more = source.asked.borrow()[asked.len()..].to_vec();
        assert_eq!((more.len(), &more[0]), (1, &(end..end + 5000)));
        // All was read: from now on everybody asks.
        assert!(ahead.parts.borrow().is_empty());
        reads(&ahead, 0..10).await;
        assert_eq!(source.asked.borrow().last(), Some(&(0..10)));
        // Another time, once is enough.
        ahead.ask(0..1 << 20, 8);
        let kept = ahead.parts.borrow().len();
        ahead.ask(0..SIZE, 8);
        assert_eq!((kept > 1, ahead.parts.borrow().len()), (true, kept));
    });
}

#[test]
fn what_fails_is_asked_for_by_who_reads_it() {
    run(async |source, ahead| {
        source.fails.set(2);
        ahead.ask(0..1 << 20, 4);
        let count = ahead.parts.borrow().len();
        join_all([reads(&ahead, 0..100), reads(&ahead, 0..1 << 20)]).await;
        let asked = source.asked.borrow().clone();
        // The two that failed, the first of them for both readers.
        let again = asked.len() - count;
        assert!((2..=4).contains(&again), "{asked:?}");
    });
}

#[test]
fn what_nobody_reads_is_forgotten() {
    run(async |source, ahead| {
        ahead.ask(0..1 << 20, 4);
        tokio::time::sleep(2 * TIMES.0).await;
        assert!(!ahead.parts.borrow().is_empty(), "not as soon as it came");
        while !ahead.parts.borrow().is_empty() {
            tokio::time::sleep(TIMES.0).await;
        }
        drop(ahead);
        assert_eq!(Rc::strong_count(&source), 1, "no task holds it");
    });
    run(async |source, ahead| {
        ahead.ask(0..1 << 20, 4);
        tokio::task::yield_now().await;
        drop(ahead);
        tokio::task::yield_now().await;
        assert_eq!(Rc::strong_count(&source), 1, "what was under way is given up");
    });
}
