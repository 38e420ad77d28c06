//! The model of a disk: for each byte, the values that a guest may see.
//!
//! While a change runs, a byte may be old or new; when it succeeded, it is new; when it failed, it is either. Changes
//! that run at the same time may take effect in either order. A discarded byte is what it was or zero. Whatever it is, it stays that until the
//! next change: what one read has seen, the next must see.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// What a change puts into a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Zero bytes.
    Zero,
    /// Bytes that depend on the tag and on their offset, and are never zero.
    Pattern(u8),
}

impl Fill {
    /// The byte at an offset of the disk.
    pub fn byte(self, offset: u64) -> u8 {
        match self {
            Fill::Zero => 0,
            Fill::Pattern(tag) => {
                ((offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ tag.wrapping_mul(2)) | 1
            }
        }
    }

    /// The bytes of a range.
    pub fn bytes(self, range: Range<u64>) -> Vec<u8> {
        range.map(|offset| self.byte(offset)).collect()
    }
}

/// How many values are told apart for one byte.
const MOST: usize = 14;

/// The values that one byte may have. When there are too many, any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Allowed {
    values: [u8; MOST],
    len: u8,
    any: bool,
}

impl Allowed {
    fn only(value: u8) -> Self {
        Self { values: [value; MOST], len: 1, any: false }
    }

    fn values(&self) -> &[u8] {
        &self.values[..usize::from(self.len)]
    }

    fn contains(&self, value: u8) -> bool {
        self.any || self.values().contains(&value)
    }

    fn add(&mut self, value: u8) {
        let at = usize::from(self.len);
        if self.contains(value) {
            return;
        }
        match self.values.get_mut(at) {
            Some(free) => {
                *free = value;
                self.len += 1;
            }
            None => self.any = true,
        }
    }
}

struct Running {
    id: u64,
    range: Range<u64>,
    fill: Fill,
    /// What other changes that ran at the same time wrote, and where.
    rivals: Vec<(Range<u64>, Fill)>,
}

struct Reader {
    id: u64,
    range: Range<u64>,
    allowed: Vec<Allowed>,
    /// Bytes that a change touched meanwhile.
    changed: Vec<bool>,
}

struct State {
    bytes: Vec<Allowed>,
    running: Vec<Running>,
    readers: Vec<Reader>,
    next_id: u64,
}

/// The model; see the module.
pub struct Model(RefCell<State>);

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

impl Model {
    /// A disk that reads as `content`.
    pub fn new(content: &[u8]) -> Rc<Self> {
        Rc::new(Self(RefCell::new(State {
            bytes: content.iter().map(|byte| Allowed::only(*byte)).collect(),
            running: Vec::new(),
            readers: Vec::new(),
            next_id: 0,
        })))
    }

    /// A write of data or zeroes starts. A [`Mutation`] that is dropped counts as failed.
    pub fn begin(self: &Rc<Self>, range: Range<u64>, fill: Fill) -> Mutation {
        let id = self.0.borrow_mut().begin(range, fill);
        Mutation { model: self.clone(), id, sure: true, settled: false }
    }

    /// A discard starts: even when it succeeds the bytes may stay what they were.
    pub fn begin_discard(self: &Rc<Self>, range: Range<u64>) -> Mutation {
        let mut mutation = self.begin(range, Fill::Zero);
        mutation.sure = false;
        mutation
    }

    /// A read starts.
    pub fn begin_read(self: &Rc<Self>, range: Range<u64>) -> Reading {
        let mut state = self.0.borrow_mut();
        let id = state.next_id();
        let allowed = state.bytes[range.start as usize..range.end as usize].to_vec();
        let mut changed = vec![false; allowed.len()];
        for running in &state.running {
            for offset in overlap(&range, &running.range) {
                changed[(offset - range.start) as usize] = true;
            }
        }
        state.readers.push(Reader { id, range, allowed, changed });
        drop(state);
        Reading { model: self.clone(), id }
    }
}

impl State {
    fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn begin(&mut self, range: Range<u64>, fill: Fill) -> u64 {
        let id = self.next_id();
        for offset in range.clone() {
            self.bytes[offset as usize].add(fill.byte(offset));
        }
        for reader in &mut self.readers {
            for offset in overlap(&reader.range, &range) {
                let at = (offset - reader.range.start) as usize;
                reader.allowed[at].add(fill.byte(offset));
                reader.changed[at] = true;
            }
        }
        let mut rivals = Vec::new();
        for other in &mut self.running {
            if !overlap(&other.range, &range).is_empty() {
                rivals.push((other.range.clone(), other.fill));
                other.rivals.push((range.clone(), fill));
            }
        }
        self.running.push(Running { id, range, fill, rivals });
        id
    }

    fn end(&mut self, id: u64, settled: bool) {
        let at = self.running.iter().position(|one| one.id == id).expect("ends once");
        let ended = self.running.swap_remove(at);
        if !settled {
            return;
        }
        for offset in ended.range {
            let mut allowed = Allowed::only(ended.fill.byte(offset));
            for (range, fill) in &ended.rivals {
                if range.contains(&offset) {
                    allowed.add(fill.byte(offset));
                }
            }
            // A rival that is a discard, or that fails, may leave what stood before it: what was allowed stays so.
            if ended.rivals.iter().any(|(range, _)| range.contains(&offset)) {
                let before = self.bytes[offset as usize];
                before.values().iter().for_each(|value| allowed.add(*value));
                allowed.any |= before.any;
            }
            self.bytes[offset as usize] = allowed;
        }
    }

    fn check(&mut self, id: u64, data: &[u8]) {
        let at = self.readers.iter().position(|one| one.id == id).expect("checked once");
        let reader = self.readers.swap_remove(at);
        assert_eq!(data.len() as u64, reader.range.end - reader.range.start, "the length of a read");
        for (index, offset) in reader.range.enumerate() {
            let (seen, allowed) = (data[index], reader.allowed[index]);
            assert!(
                allowed.contains(seen),
                "byte {offset} reads as {seen:#04x}, allowed are {:02x?}",
                allowed.values()
            );
            if !reader.changed[index] {
                let now = &mut self.bytes[offset as usize];
                assert!(
                    now.contains(seen),
                    "byte {offset} changed by itself: {seen:#04x}, {:02x?}",
                    now.values()
                );
                *now = Allowed::only(seen);
            }
        }
    }
}

/// A change that runs.
#[must_use]
pub struct Mutation {
    model: Rc<Model>,
    id: u64,
    /// Success leaves no doubt.
    sure: bool,
    settled: bool,
}

impl Mutation {
    /// It succeeded.
    pub fn done(mut self) {
        self.settled = self.sure;
    }
}

impl Drop for Mutation {
    fn drop(&mut self) {
        self.model.0.borrow_mut().end(self.id, self.settled);
    }
}

/// A read that runs. Dropped, it is forgotten.
#[must_use]
pub struct Reading {
    model: Rc<Model>,
    id: u64,
}

impl Reading {
    /// It returned these bytes.
    ///
    /// # Panics
    /// If one of them can't be.
    pub fn check(self, data: &[u8]) {
        self.model.0.borrow_mut().check(self.id, data);
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        // While a failed check unwinds, the state is still borrowed.
        if let Ok(mut state) = self.model.0.try_borrow_mut() {
            state.readers.retain(|one| one.id != self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may_read(model: &Rc<Model>, at: u64, byte: u8) -> bool {
        model.0.borrow().bytes[at as usize].contains(byte)
    }

    #[test]
    fn a_running_write_may_be_seen_or_not_and_then_must_be() {
        let model = Model::new(&[7; 8]);
        let early = model.begin_read(0..4);
        let write = model.begin(2..6, Fill::Zero);
        let late = model.begin_read(2..4);
        write.done();
        early.check(&[7, 7, 0, 7]);
        late.check(&[7, 0]);
        assert!(!may_read(&model, 2, 7));
        model.begin_read(0..8).check(&[7, 7, 0, 0, 0, 0, 7, 7]);
    }

    #[test]
    fn a_failed_write_is_in_doubt_until_it_was_read() {
        let model = Model::new(&[7; 2]);
        drop(model.begin(0..2, Fill::Zero));
        model.begin_read(0..2).check(&[0, 7]);
        assert!(!may_read(&model, 0, 7) && !may_read(&model, 1, 0));
    }

    #[test]
    #[should_panic(expected = "byte 0 reads as 0x07")]
    fn what_was_discarded_and_seen_as_zero_never_comes_back() {
        let model = Model::new(&[7]);
        model.begin_discard(0..1).done();
        model.begin_read(0..1).check(&[0]);
        model.begin_read(0..1).check(&[7]);
    }

    #[test]
    fn changes_at_the_same_time_take_effect_in_either_order() {
        let model = Model::new(&[7]);
        let (a, b) = (model.begin(0..1, Fill::Zero), model.begin(0..1, Fill::Pattern(3)));
        let pattern = Fill::Pattern(3).byte(0);
        a.done();
        assert!(may_read(&model, 0, 0) && may_read(&model, 0, pattern));
        b.done();
        assert!(may_read(&model, 0, 0) && may_read(&model, 0, pattern));
        model.begin(0..1, Fill::Zero).done();
        assert!(!may_read(&model, 0, pattern));
    }
}
