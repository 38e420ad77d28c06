//! How many requests the ring has at once. The kernel wants a queue for each processor that there may ever be; a request goes into the queue of the
//! processor that it is made on, and waits there while all entries of the queue are in use.

use std::fs;
use std::io;
use std::num::ParseIntError;

/// The longest read or write, in bytes: more than this the kernel splits.
pub(crate) const MAX_PAYLOAD: u32 = 1 << 20;

/// What all entries may take together. A payload's memory is taken when it is first used, and the kernel uses again what it used last: so this
/// is a bound, which a client reaches only by making many long requests at once, on all processors.
const BUDGET: u64 = 64 << 20;

/// The shortest payload, and the fewest and most entries of a queue. With many processors the first two may come to more than the budget.
const MIN_PAYLOAD: u32 = 128 << 10;
const MIN_DEPTH: u16 = 8;
const MAX_DEPTH: u16 = 64;

/// The ring's entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// The longest read or write, in bytes.
    pub(crate) payload: u32,
    /// How many entries each queue has.
    pub(crate) depths: Vec<u16>,
}

impl Layout {
    /// The one for this machine.
    ///
    /// # Errors
    /// If the kernel doesn't say what processors there are.
    pub(crate) fn of_this_machine() -> io::Result<Self> {
        let list = |which| {
            let path = format!("/sys/devices/system/cpu/{which}");
            let text = fs::read_to_string(&path)?;
            list(&text).map_err(|error| {
                io::Error::new(io::ErrorKind::InvalidData, format!("{path} is {text:?}: {error}"))
            })
        };
        Ok(Self::new(&list("possible")?, &list("online")?))
    }

    fn new(possible: &[u16], online: &[u16]) -> Self {
        let depth = |payload: u32| BUDGET / (u64::from(payload) * online.len().max(1) as u64);
        let mut payload = MAX_PAYLOAD;
        while payload > MIN_PAYLOAD && depth(payload) < MIN_DEPTH.into() {
            payload /= 2;
        }
        let depth = depth(payload).clamp(MIN_DEPTH.into(), MAX_DEPTH.into()) as u16;
        // Most of those that aren't there now never will be.
        let depths = possible.iter().map(|processor| if online.contains(processor) { depth } else { 1 });
        Self { payload, depths: depths.collect() }
    }

    /// How many there are in all queues.
    pub(crate) fn entries(&self) -> usize {
        self.depths.iter().map(|depth| usize::from(*depth)).sum()
    }
}

/// Numbers as the kernel lists them: `0-3,8`.
fn list(text: &str) -> Result<Vec<u16>, ParseIntError> {
    let mut all = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        all.extend(first.parse::<u16>()?..=last.parse()?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(count: u16) -> Vec<u16> {
        (0..count).collect()
    }

    #[test]
    fn all_entries_fit_into_the_budget_while_there_are_enough() {
        for (processors, payload, depth) in
            [(1, 1 << 20, 64), (2, 1 << 20, 32), (8, 1 << 20, 8), (16, 512 << 10, 8), (64, 128 << 10, 8)]
        {
            let layout = Layout::new(&first(processors), &first(processors));
            assert_eq!(layout, Layout { payload, depths: vec![depth; processors.into()] });
            assert!(layout.entries() as u64 * u64::from(payload) <= BUDGET, "{processors}");
        }
        let large = Layout::new(&first(512), &first(512));
        assert_eq!((large.payload, large.depths[511]), (128 << 10, 8));
    }

    #[test]
    fn processors_that_arent_there_have_a_queue_too() {
        let layout = Layout::new(&first(240), &[0, 2]);
        assert_eq!((layout.depths.len(), &layout.depths[..4]), (240, &[32, 1, 32, 1][..]));
        assert_eq!(layout.entries(), 302);
    }

    #[test]
    fn processors_are_listed_as_the_kernel_does() {
        assert_eq!(list("0\n"), Ok(vec![0]));
        assert_eq!(list("0-3,8,10-11\n"), Ok(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(list("\n"), Ok(vec![]));
        assert!(list("0-").is_err() && list("x").is_err() && list("70000").is_err());
    }
}
