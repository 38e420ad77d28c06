//! Looks for what must be copied, ahead of the copies.
//!
//! A look-up may cost a round trip to the source, so several segments of the disk are looked through at once. Segments grow where
//! there is little to find and shrink where there is much. The scan stops when enough has been found to keep the copies busy, so
//! that its memory is bounded whatever the image.

use crate::copier::Copier;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use headwater_block::chain::Missing;
use headwater_block::{Error, LocalFuture};
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Context, Poll};

/// How many segments are looked through at once.
const AT_ONCE: usize = 4;

/// How many runs one look through a segment brings at most.
const MOST_RUNS: usize = 64;

/// The bounds of a segment's size in bytes. The least is smaller for disks of which it would be more than a sixteenth.
const SEGMENT: Range<u64> = 32 << 20..1 << 40;

/// What one look brought.
pub(crate) struct Scanned {
    /// What was looked through; what lies between this and the segment's end is looked through later.
    pub(crate) range: Range<u64>,
    /// What must be copied in there.
    pub(crate) found: Vec<Missing>,
    /// Why it stopped before the segment's end. The rest of the segment is the caller's, to give back by [`Scanner::again`].
    pub(crate) error: Option<(Error, Range<u64>)>,
}

struct Looked {
    segment: Range<u64>,
    until: u64,
    found: Vec<Missing>,
    error: Option<Error>,
}

/// The scan of a disk; see the module.
pub(crate) struct Scanner {
    copier: Rc<dyn Copier>,
    todo: VecDeque<Range<u64>>,
    running: Vec<Range<u64>>,
    looks: FuturesUnordered<LocalFuture<'static, Looked>>,
    /// A power of two, and so a multiple of the allocation unit.
    least: u64,
    segment: u64,
}

impl Scanner {
    /// A scan of nothing yet.
    pub(crate) fn new(copier: &Rc<dyn Copier>) -> Self {
        let unit = copier.unit();
        let least = (copier.size() / 16).next_power_of_two().clamp(unit, SEGMENT.start.max(unit));
        Self {
            copier: copier.clone(),
            todo: VecDeque::new(),
            running: Vec::new(),
            looks: FuturesUnordered::new(),
            least,
            segment: least,
        }
    }

    /// Bytes that were not looked through yet.
    pub(crate) fn rest(&self) -> u64 {
        self.todo.iter().chain(&self.running).map(|range| range.end - range.start).sum()
    }

    /// True if everything was looked through.
    pub(crate) fn is_over(&self) -> bool {
        self.todo.is_empty() && self.running.is_empty()
    }

    /// True if more could be looked through at once than is known.
    pub(crate) fn wants_more(&self) -> bool {
        self.todo.is_empty() && self.running.len() < AT_ONCE
    }

    /// Looks through a range, behind the others.
    pub(crate) fn add(&mut self, range: Range<u64>) {
        self.todo.push_back(range);
    }

    /// Looks through a range again.
    pub(crate) fn again(&mut self, range: Range<u64>) {
        self.todo.push_front(range);
    }

    /// Starts as many looks as may run at once.
    pub(crate) fn start(&mut self) {
        while self.running.len() < AT_ONCE {
            let Some(mut segment) = self.todo.pop_front() else { return };
            let cut = (segment.start / self.least * self.least).saturating_add(self.segment);
            if cut < segment.end {
                self.todo.push_front(cut..segment.end);
                segment.end = cut;
            }
            self.running.push(segment.clone());
            self.looks.push(Box::pin(look(self.copier.clone(), segment)));
        }
    }

    /// Gives up what is being looked up; it is looked up again later.
    pub(crate) fn withdraw(&mut self) {
        self.looks.clear();
        for segment in self.running.drain(..) {
            self.todo.push_front(segment);
        }
    }

    /// What the next look brought. Pending for ever if none runs.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Scanned> {
        let Poll::Ready(Some(looked)) = self.looks.poll_next_unpin(cx) else { return Poll::Pending };
        let Looked { segment, until, found, error } = looked;
        self.running.retain(|range| range.start != segment.start);
        let rest = until..segment.end;
        let range = segment.start..until;
        if let Some(error) = error {
            return Poll::Ready(Scanned { range, found, error: Some((error, rest)) });
        }
        if !rest.is_empty() {
            self.segment = (self.segment / 2).max(self.least);
            self.todo.push_front(rest);
        } else if found.is_empty() {
            self.segment = (self.segment * 2).min(SEGMENT.end);
        }
        Poll::Ready(Scanned { range, found, error: None })
    }
}

async fn look(copier: Rc<dyn Copier>, segment: Range<u64>) -> Looked {
    let mut looked = Looked { until: segment.start, segment, found: Vec::new(), error: None };
    while looked.until < looked.segment.end && looked.found.len() < MOST_RUNS {
        match copier.clone().look(looked.until..looked.segment.end).await {
            Ok(Some(missing)) => {
                // Runs end with whole units, the last one perhaps past the disk's end.
                looked.until = missing.range.end.min(looked.segment.end);
                looked.found.push(missing);
            }
            Ok(None) => looked.until = looked.segment.end,
            Err(error) => {
                looked.error = Some(error);
                break;
            }
        }
    }
    looked
}
