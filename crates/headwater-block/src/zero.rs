//! Finding zeroes in data.

/// True if every byte is zero. An empty slice is.
///
/// Looks at the ends and the middle first, because data that isn't zero mostly shows it there; the rest is read in
/// blocks that the compiler turns into vector code.
pub fn is_zero(data: &[u8]) -> bool {
    const BLOCK: usize = 256;
    if let (Some(first), Some(last)) = (data.first(), data.last())
        && (*first | *last | data[data.len() / 2]) != 0
    {
        return false;
    }
    let mut blocks = data.chunks_exact(BLOCK);
    blocks.by_ref().all(|block| block.iter().fold(0, |acc, byte| acc | byte) == 0)
        && blocks.remainder().iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn finds_a_single_set_byte_anywhere() {
        assert!(is_zero(&[]));
        for len in [1, 2, 255, 256, 257, 1000] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for at in 0..len {
                data[at] = 1;
                assert!(!is_zero(&data), "byte {at} of {len}");
                data[at] = 0;
            }
        }
    }
}
