//! Changes inputs at random, as libFuzzer does but blindly: for tests that run everywhere.

/// A small generator of random numbers (xorshift), so that a failure can be repeated from its number.
pub struct Mutator {
    state: u64,
}

/// Numbers that lengths and offsets go wrong at.
const EDGES: [u64; 12] = [0, 1, 7, 127, 255, 512, 4096, 65535, 1 << 31, u32::MAX as u64, 1 << 63, u64::MAX];

impl Mutator {
    /// The generator number `seed`.
    pub fn new(seed: u64) -> Self {
        Self { state: (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        // A slight bias is no harm here.
        (self.state >> 11) as usize % bound
    }

    /// One of the inputs, changed in a few places, of at most `max_len` bytes.
    pub fn change(&mut self, inputs: &[Vec<u8>], max_len: usize) -> Vec<u8> {
        let mut input = self.pick(inputs).cloned().unwrap_or_default();
        for _ in 0..=self.below(4) {
            self.step(&mut input, inputs);
        }
        input.truncate(max_len);
        input
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() { None } else { from.get(self.below(from.len())) }
    }

    fn step(&mut self, input: &mut Vec<u8>, inputs: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        match self.below(8) {
            0 => input.truncate(at),
            1 => input.insert(at, self.below(256) as u8),
            2 => {
                let end = (at + 1 + self.below(16)).min(input.len());
                input.drain(at..end);
            }
            3 => {
                let value = self.pick(&EDGES).copied().unwrap_or_default();
                let (width, big) = (1 << self.below(4), self.below(2) == 0);
                let bytes = if big { value.to_be_bytes() } else { value.to_le_bytes() };
                let bytes = if big { &bytes[8 - width..] } else { &bytes[..width] };
                let end = (at + width).min(input.len());
                input[at..end].copy_from_slice(&bytes[..end - at]);
            }
            4 => {
                let other = self.pick(inputs).cloned().unwrap_or_default();
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            5 => {
                let part = input[at..(at + 1 + self.below(32)).min(input.len())].to_vec();
                let to = self.below(input.len() + 1);
                input.splice(to..to, part);
            }
            _ => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_can_be_repeated_and_keep_the_length() {
        let inputs = [vec![1; 40], b"some text".to_vec(), Vec::new()];
        for seed in 0..200 {
            let once = Mutator::new(seed).change(&inputs, 30);
            assert_eq!(once, Mutator::new(seed).change(&inputs, 30));
            assert!(once.len() <= 30);
        }
        assert_eq!(Mutator::new(1).change(&[], 0), Vec::<u8>::new());
    }
}
