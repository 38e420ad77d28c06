//! A picture of a chain: one bar for each layer, the disk's bytes from left to right.

use crate::size::human;
use headwater_block::{ExtentKind, Node, Result};
use std::fmt::Write;
use std::rc::Rc;

/// How many cells a bar has.
const CELLS: u64 = 64;

/// The layers of a chain, from the top down.
pub fn layers(top: &Rc<dyn Node>) -> Vec<Rc<dyn Node>> {
    std::iter::successors(Some(top.clone()), |node| node.backing()).collect()
}

/// What a part of a layer holds.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    data: u64,
    zero: u64,
    total: u64,
}

impl Share {
    /// Shades of data; a dot where the layer says "zero", nothing where it says nothing.
    fn cell(self) -> char {
        match (self.data * 4).div_ceil(self.total.max(1)) {
            0 if self.zero > 0 => '·',
            0 => ' ',
            1 => '░',
            2 => '▒',
            3 => '▓',
            _ => '█',
        }
    }
}

/// Draws the chain on top of `top`.
///
/// # Errors
/// Those of the layers.
pub async fn draw(top: &Rc<dyn Node>) -> Result<String> {
    let size = top.size();
    let mut text = String::new();
    for (depth, node) in layers(top).iter().enumerate() {
        let cells = shares(node, size).await?;
        let sum = |of: fn(&Share) -> u64| cells.iter().map(of).sum::<u64>();
        let bar: String = cells.iter().map(|share| share.cell()).collect();
        let (data, zero) = (human(sum(|s| s.data)), human(sum(|s| s.zero)));
        let _ = writeln!(text, "{depth} {} ({}, {})", node.name(), node.driver(), human(node.size()));
        let _ = writeln!(text, "  ▕{bar}▏ {data} data, {zero} zero");
    }
    let _ = writeln!(text, "  █ data, ░▒▓ some data, · zero, blank: the layer below decides");
    Ok(text)
}

/// What `node` itself holds of each cell of a disk of `size` bytes.
async fn shares(node: &Rc<dyn Node>, size: u64) -> Result<Vec<Share>> {
    let edge = |cell: u64| (u128::from(size) * u128::from(cell) / u128::from(CELLS)) as u64;
    let mut cells: Vec<Share> =
        (0..CELLS).map(|cell| Share { total: edge(cell + 1) - edge(cell), ..Share::default() }).collect();
    let end = size.min(node.size());
    let mut pos = 0;
    let mut cell = 0;
    while pos < end {
        let extent = node.status(pos..end).await?;
        let stop = extent.end().min(end);
        while pos < stop {
            while edge(cell + 1) <= pos {
                cell += 1;
            }
            let part = stop.min(edge(cell + 1)) - pos;
            let share = &mut cells[cell as usize];
            match extent.kind {
                ExtentKind::Data => share.data += part,
                ExtentKind::Zero => share.zero += part,
                ExtentKind::Unallocated => {}
            }
            pos += part;
        }
    }
    Ok(cells)
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_block::memory::MemoryNode;

    #[tokio::test(flavor = "current_thread")]
    async fn a_bar_shows_where_data_are() {
        let mut bytes = vec![0; 64 * 4096];
        bytes[..16 * 4096].fill(1);
        bytes[32 * 4096] = 1;
        let node: Rc<dyn Node> = MemoryNode::new("disk", bytes);
        let text = draw(&node).await.unwrap();
        let bar = format!("▕{}{}█{}▏", "█".repeat(16), "·".repeat(16), "·".repeat(31));
        assert!(text.contains(&bar), "{text}");
        assert!(text.contains("68 KiB data"), "{text}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn tiny_and_empty_disks_have_pictures_too() {
        for len in [0, 1, 63, 65] {
            let node: Rc<dyn Node> = MemoryNode::new("disk", vec![1; len]);
            assert!(draw(&node).await.is_ok());
        }
    }
}
