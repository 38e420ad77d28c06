//! What a node says about a range of its bytes.

use crate::node::Node;
use std::fmt;
use std::rc::Rc;

/// The status of a run of bytes in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// This layer holds the data.
    Data,
    /// This layer says that the bytes read as zeroes; nothing need be read.
    Zero,
    /// This layer lacks the bytes: the backing decides, and without one they read as zeroes.
    Unallocated,
}

/// A run of bytes of one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where the run starts, in bytes of the guest's disk.
    pub offset: u64,
    /// Its length in bytes; never 0.
    pub len: u64,
    /// What the layer at `depth` says of it.
    pub kind: ExtentKind,
    /// How many layers below the node that was asked the status comes from; 0 is the node itself.
    /// For `Unallocated` it is the number of layers that were searched.
    pub depth: u32,
    /// Where the data lie in the layer's own file, where that is one plain run of bytes.
    pub host_offset: Option<u64>,
    /// The data are stored compressed.
    pub compressed: bool,
}

impl Extent {
    /// An extent at depth 0 without a host offset.
    pub fn new(offset: u64, len: u64, kind: ExtentKind) -> Self {
        Self { offset, len, kind, depth: 0, host_offset: None, compressed: false }
    }

    /// The first byte after the run.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// The answer of a synchronous look-up: where the start of a range can be read right now, from memory alone.
#[derive(Clone)]
pub enum Resolved {
    /// The first `len` bytes lie at `offset` of `node`, which can be read directly.
    At {
        /// The node to read from, usually a file.
        node: Rc<dyn Node>,
        /// The offset in that node, in bytes.
        offset: u64,
        /// How many bytes from the start of the range this holds for; never 0.
        len: u64,
        /// How many layers below the node that was asked the data lie; 0 is the node itself.
        depth: u32,
    },
    /// The first `len` bytes read as zeroes.
    Zero {
        /// How many bytes from the start of the range this holds for; never 0.
        len: u64,
        /// As for `At`. Bytes that no layer holds have the depth of the last layer plus one.
        depth: u32,
    },
    /// Memory doesn't know: use the asynchronous calls.
    Ask,
}

impl fmt::Debug for Resolved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Resolved::At { node, offset, len, depth } => {
                write!(f, "At({} offset {offset}, {len} bytes, depth {depth})", node.name())
            }
            Resolved::Zero { len, depth } => write!(f, "Zero({len} bytes, depth {depth})"),
            Resolved::Ask => f.write_str("Ask"),
        }
    }
}
