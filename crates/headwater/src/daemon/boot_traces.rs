//! Boot traces that are recorded of nodes: what the guests of each read first, into a file that `block-stream` takes later (`x-headwater-boot-trace`).
//!
//! What is recorded belongs to the disk that the node is: reads that come by an export of the node, or of a filter above it. A snapshot puts another node in its
//! place, which isn't recorded.

use super::failure::{Refusal, of_failure};
use super::graph::GraphNode;
use crate::boot_trace::Recording;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

/// One that is under way.
struct Under {
    file: String,
    recording: Recording,
}

/// Those that are under way, by the names of their nodes.
#[derive(Default)]
pub(super) struct Recordings(RefCell<BTreeMap<String, Under>>);

impl Recordings {
    /// The file that `node` is recorded into, if it is.
    pub(super) fn file(&self, node: &str) -> Option<String> {
        self.0.borrow().get(node).map(|under| under.file.clone())
    }

    /// Records `node` into `file` from now on. One that was under way ends.
    ///
    /// # Errors
    /// If no file can be made there, or what the other one recorded can't be written. Then the new one doesn't begin.
    pub(super) async fn start(&self, node: &Rc<GraphNode>, file: &str) -> Result<(), Refusal> {
        self.end(&node.name).await?;
        let recording = Recording::start(Path::new(file), &node.disk).map_err(of_failure)?;
        self.0.borrow_mut().insert(node.name.clone(), Under { file: file.to_owned(), recording });
        Ok(())
    }

    /// Ends the recording of the node of this name, and writes what there is. Nothing happens if there is none.
    ///
    /// # Errors
    /// What the system says to the file.
    pub(super) async fn end(&self, node: &str) -> Result<(), Refusal> {
        let under = self.0.borrow_mut().remove(node);
        match under {
            Some(under) => under.recording.finish().await.map_err(of_failure),
            None => Ok(()),
        }
    }

    /// Ends all.
    pub(super) async fn end_all(&self) {
        let names: Vec<String> = self.0.borrow().keys().cloned().collect();
        for name in names {
            if let Err(refusal) = self.end(&name).await {
                tracing::error!("{}", refusal.desc);
            }
        }
    }
}
