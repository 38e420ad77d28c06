//! What goes wrong, and when.

use crate::rng::Rng;
use headwater_block::{Error, ErrorKind};
use std::ops::Range;

/// The kinds of operation that a fault can hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Op {
    /// Reads of data.
    Read,
    /// Look-ups of the status of a range.
    Status,
    /// Writes of data.
    Write,
    /// Writes of zeroes.
    WriteZeroes,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
    /// Changes of the backing link, closing and resizing.
    Header,
}

/// One rule; an operation fails if any rule says so.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Which operations it hits.
    pub ops: Vec<Op>,
    /// Hits only operations that touch this range of bytes.
    pub range: Option<Range<u64>>,
    /// How many matching operations pass before it hits.
    pub skip: u64,
    /// How many it hits then; afterwards the rule is spent.
    pub times: u64,
    /// How likely it hits a matching operation, 0 to 1.
    pub probability: f64,
    /// The error.
    pub kind: ErrorKind,
}

impl Op {
    /// All kinds.
    pub const ALL: &[Op] =
        &[Op::Read, Op::Status, Op::Write, Op::WriteZeroes, Op::Discard, Op::Flush, Op::Header];
}

impl Fault {
    /// Every operation of these kinds fails.
    pub fn always(ops: &[Op], kind: ErrorKind) -> Self {
        Self { ops: ops.to_vec(), range: None, skip: 0, times: u64::MAX, probability: 1.0, kind }
    }

    /// The `n`-th operation (from 0) of these kinds fails, once.
    pub fn nth(ops: &[Op], n: u64, kind: ErrorKind) -> Self {
        Self { skip: n, times: 1, ..Self::always(ops, kind) }
    }

    /// Operations of these kinds fail with this probability, at most `times` times.
    pub fn sometimes(ops: &[Op], probability: f64, times: u64, kind: ErrorKind) -> Self {
        Self { probability, times, ..Self::always(ops, kind) }
    }

    /// Operations of these kinds that touch `range` fail.
    pub fn at(ops: &[Op], range: Range<u64>, kind: ErrorKind) -> Self {
        Self { range: Some(range), ..Self::always(ops, kind) }
    }
}

/// The rules of one node.
#[derive(Debug, Default)]
pub struct Faults {
    rules: Vec<Fault>,
    hits: u64,
}

impl Faults {
    /// Adds a rule.
    pub fn add(&mut self, fault: Fault) {
        self.rules.push(fault);
    }

    /// Forgets all rules: the storage is repaired.
    pub fn clear(&mut self) {
        self.rules.clear();
    }

    /// How many operations have failed.
    pub fn hits(&self) -> u64 {
        self.hits
    }

    /// Asks whether an operation fails.
    pub(crate) fn check(&mut self, rng: &Rng, node: &str, op: Op, range: &Range<u64>) -> Result<(), Error> {
        let touches = |at: &Range<u64>| at.start < range.end && range.start < at.end;
        for rule in &mut self.rules {
            if rule.times == 0 || !rule.ops.contains(&op) || !rule.range.as_ref().is_none_or(touches) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rng.chance(rule.probability) {
                rule.times -= 1;
                self.hits += 1;
                let message = format!("{node}: injected {:?} at {op:?} of {range:?}", rule.kind);
                return Err(Error::new(rule.kind, message));
            }
        }
        Ok(())
    }
}
