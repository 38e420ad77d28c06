//! Sparse bytes: what a simulated file or image holds.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes with holes. A hole reads as zeroes; only [`Pages::punch`] makes one again.
#[derive(Clone)]
pub struct Pages {
    size: u64,
    unit: usize,
    pages: BTreeMap<u64, Box<[u8]>>,
}

impl Pages {
    /// `size` bytes of hole, whose parts appear and vanish in units of `unit` bytes.
    pub fn new(size: u64, unit: usize) -> Self {
        assert!(unit > 0);
        Self { size, unit, pages: BTreeMap::new() }
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Changes the size; what is cut off is gone, what is added is a hole.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        let unit = self.unit as u64;
        self.pages.retain(|page, _| page * unit < size);
        if let Some(last) = self.pages.get_mut(&(size / unit)) {
            last[(size % unit) as usize..].fill(0);
        }
    }

    /// Fills `out` from `offset`; past the end there are zeroes.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        for (page, within, part) in self.parts(offset, out.len()) {
            let out = &mut out[part];
            match self.pages.get(&page) {
                Some(bytes) => out.copy_from_slice(&bytes[within..within + out.len()]),
                None => out.fill(0),
            }
        }
    }

    /// Writes `data` at `offset`; the size grows to hold it.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.size = self.size.max(offset + data.len() as u64);
        for (page, within, part) in self.parts(offset, data.len()).collect::<Vec<_>>() {
            let unit = self.unit;
            let bytes = self.pages.entry(page).or_insert_with(|| vec![0; unit].into());
            bytes[within..within + part.len()].copy_from_slice(&data[part]);
        }
    }

    /// Makes a range read as zeroes: units that lie in it become holes, the rest is written.
    pub fn punch(&mut self, range: Range<u64>) {
        let end = range.end.min(self.size);
        let Some(len) = end.checked_sub(range.start) else { return };
        for (page, within, part) in self.parts(range.start, len as usize).collect::<Vec<_>>() {
            let reaches_end = (page + 1) * self.unit as u64 >= self.size && range.end >= self.size;
            if within == 0 && (part.len() == self.unit || reaches_end) {
                self.pages.remove(&page);
            } else if let Some(bytes) = self.pages.get_mut(&page) {
                bytes[within..within + part.len()].fill(0);
            }
        }
    }

    /// True if the byte lies in a hole, and the first offset at which that ends.
    pub fn run(&self, offset: u64) -> (bool, u64) {
        let unit = self.unit as u64;
        let mut page = offset / unit;
        let hole = !self.pages.contains_key(&page);
        if hole {
            let next = self.pages.range(page..).next().map_or(self.size, |(page, _)| page * unit);
            return (true, next.max(offset + 1));
        }
        while self.pages.contains_key(&page) {
            page += 1;
        }
        (false, page * unit)
    }

    /// How many bytes are held.
    pub fn held(&self) -> u64 {
        self.pages.len() as u64 * self.unit as u64
    }

    /// The pages that `len` bytes at `offset` touch: page, offset in it, range of the bytes.
    fn parts(&self, offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> + use<> {
        let unit = self.unit;
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let at = offset + done as u64;
            let within = (at % unit as u64) as usize;
            let part = done..len.min(done + unit - within);
            done = part.end;
            Some((at / unit as u64, within, part))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn behaves_as_a_plain_vector() {
        let rng = Rng::new(1);
        let (mut pages, mut plain) = (Pages::new(1000, 64), vec![0; 1000]);
        for _ in 0..2000 {
            let range = rng.byte_range(1200, 200, 64);
            let at = range.start as usize..range.end as usize;
            match rng.range(0..4) {
                0 => {
                    let data = vec![rng.range(1..256) as u8; at.len()];
                    pages.write(range.start, &data);
                    plain.resize(plain.len().max(at.end), 0);
                    plain[at].copy_from_slice(&data);
                }
                1 => {
                    pages.punch(range);
                    let end = at.end.min(plain.len());
                    plain.get_mut(at.start..end).into_iter().for_each(|bytes| bytes.fill(0));
                }
                2 if rng.one_in(10) => {
                    pages.resize(range.end);
                    plain.resize(at.end, 0);
                }
                _ => {
                    let mut out = vec![1; at.len()];
                    pages.read(range.start, &mut out);
                    let expected: Vec<u8> = at.map(|i| plain.get(i).copied().unwrap_or(0)).collect();
                    assert_eq!(out, expected);
                }
            }
            assert_eq!(pages.size(), plain.len() as u64);
        }
    }

    #[test]
    fn holes_are_found_and_made() {
        let mut pages = Pages::new(1024, 64);
        assert_eq!(pages.run(5), (true, 1024));
        pages.write(100, &[1; 100]);
        assert_eq!(pages.run(0), (true, 64));
        assert_eq!(pages.run(70), (false, 256));
        pages.punch(128..1024);
        assert_eq!(pages.run(70), (false, 128));
        assert_eq!(pages.held(), 64);
    }
}
