//! How a request is cut into pieces that a node's limits allow, as QEMU's block layer does it.

use std::ops::Range;

/// Pieces of `range` of at most `max` bytes (0: any number), a multiple of `unit` where that is possible: nothing but the first and the last piece
/// begins or ends elsewhere than at multiples of `unit` (a power of two or not, at least 1).
pub(super) fn pieces(range: Range<u64>, unit: u64, max: u64) -> impl Iterator<Item = Range<u64>> {
    let most = if max == 0 { u64::MAX } else { max };
    // Whole units, if the limit allows for one.
    let most = if most >= unit { most - most % unit } else { most };
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let left = range.end - at;
        let len = if !at.is_multiple_of(unit) {
            // Up to where units begin.
            left.min(unit - at % unit)
        } else if left > unit && !range.end.is_multiple_of(unit) && left < most {
            left - left % unit
        } else {
            left
        };
        let piece = at..at + len.min(most);
        at = piece.end;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn heads_and_tails_are_pieces_of_their_own() {
        let cut = |range, unit, max| {
            pieces(range, unit, max).map(|piece| (piece.start, piece.end)).collect::<Vec<_>>()
        };
        assert_eq!(cut(0..10, 1, 0), [(0, 10)]);
        assert_eq!(cut(0..10, 1, 4), [(0, 4), (4, 8), (8, 10)]);
        assert_eq!(cut(3..21, 4, 0), [(3, 4), (4, 20), (20, 21)]);
        assert_eq!(cut(3..21, 4, 8), [(3, 4), (4, 12), (12, 20), (20, 21)]);
        assert_eq!(cut(1..3, 4, 0), [(1, 3)]);
        assert_eq!(cut(4..4, 4, 0), []);
    }

    proptest! {
        #[test]
        fn pieces_are_the_whole_and_none_is_too_large(start in 0u64..100, len in 0u64..200, unit in 1u64..20, times in 0u64..4) {
            let range = start..start + len;
            let mut at = start;
            for piece in pieces(range.clone(), unit, unit * times) {
                prop_assert_eq!(piece.start, at);
                prop_assert!(piece.end > piece.start);
                prop_assert!(times == 0 || piece.end - piece.start <= unit * times);
                at = piece.end;
                let inner = |edge: u64| edge == range.start || edge == range.end || edge.is_multiple_of(unit);
                prop_assert!(inner(piece.start) && inner(piece.end), "{:?}", piece);
            }
            prop_assert_eq!(at, range.end);
        }
    }
}
