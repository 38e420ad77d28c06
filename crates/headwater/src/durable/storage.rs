//! Storage as a record speaks of it, and whether what is there now is the same.
//!
//! Where a protocol has nothing that changes with the contents (an export of an NBD server, a block device), the first and the last bytes stand for them: that
//! is where partition tables and file systems keep their identifiers and times. It tells one disk from another, and most disks that were in use meanwhile; it is no
//! proof.

use aws_lc_rs::digest::{SHA256, digest};
use headwater_block::{BufferMut, Node, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;

/// How much of either end is looked at, in bytes.
const SAMPLE: u64 = 64 << 10;

/// Names of marks, and their values.
type Marks = BTreeMap<String, String>;

/// A file, an export or an object.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// What people called it.
    pub name: String,
    /// In bytes; none if it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// What changes when the contents do.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub contents: Marks,
    /// What stays the same when the contents change.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub object: Marks,
}

impl Storage {
    /// Storage that changes: by what it is recognised all the same.
    ///
    /// # Errors
    /// If the system doesn't say.
    pub fn changing(name: &str, node: &dyn Node) -> Result<Self> {
        Ok(Self { name: name.to_owned(), object: marks(node.identity()?.object), ..Self::default() })
    }

    /// Storage that nobody changes.
    ///
    /// # Errors
    /// If it can't be read.
    pub async fn constant(name: &str, node: &dyn Node) -> Result<Self> {
        let size = node.size();
        let mut contents = marks(node.identity()?.contents);
        if contents.is_empty() {
            contents.insert("first and last bytes".into(), sample(node, size).await?);
        }
        Ok(Self { name: name.to_owned(), size: Some(size), contents, object: Marks::new() })
    }

    /// How the contents that are there `now` differ from these, if they do.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if self.size != now.size {
            let show = |size: Option<u64>| size.map_or("unknown".to_owned(), |size| format!("{size} bytes"));
            return Some(format!("its size was {} and is {}", show(self.size), show(now.size)));
        }
        difference(&self.contents, &now.contents)
    }

    /// What shows that it is another file `now`, if something does. A mark that one of the two lacks shows nothing.
    pub fn is_other(&self, now: &Self) -> Option<String> {
        let both = |marks: &Marks, other: &Marks| -> Marks {
            marks
                .iter()
                .filter(|(name, _)| other.contains_key(*name))
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect()
        };
        difference(&both(&self.object, &now.object), &both(&now.object, &self.object))
    }
}

fn marks(marks: Vec<(&'static str, String)>) -> Marks {
    marks.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn difference(then: &Marks, now: &Marks) -> Option<String> {
    let name = then.keys().chain(now.keys()).find(|name| then.get(*name) != now.get(*name))?;
    let show = |marks: &Marks| marks.get(name).map_or("none".to_owned(), Clone::clone);
    Some(format!("its {name} was {} and is {}", show(then), show(now)))
}

/// A digest of both ends.
async fn sample(node: &dyn Node, size: u64) -> Result<String> {
    let head = SAMPLE.min(size);
    let tail = SAMPLE.min(size - head);
    // Both are at most `SAMPLE`.
    let (head, tail) = tokio::try_join!(
        node.read(0, BufferMut::new(head as usize)),
        node.read(size - tail, BufferMut::new(tail as usize)),
    )?;
    let digest = digest(&SHA256, &[&head[..], &tail[..]].concat());
    let mut text = "sha256:".to_owned();
    for byte in digest.as_ref() {
        // Text takes everything.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_say_what_was_and_what_is() {
        let storage = |size, contents: &[(&'static str, &str)], object: &[(&'static str, &str)]| {
            let own = |all: &[(&'static str, &str)]| {
                marks(all.iter().map(|(k, v)| (*k, (*v).to_owned())).collect())
            };
            Storage { name: "s".into(), size: Some(size), contents: own(contents), object: own(object) }
        };
        let then = storage(5, &[("ETag", "a")], &[("inode", "1")]);
        assert_eq!(then.difference(&storage(5, &[("ETag", "a")], &[("inode", "2")])), None);
        assert_eq!(
            then.difference(&storage(6, &[("ETag", "a")], &[])).unwrap(),
            "its size was 5 bytes and is 6 bytes"
        );
        assert_eq!(then.difference(&storage(5, &[("ETag", "b")], &[])).unwrap(), "its ETag was a and is b");
        assert_eq!(then.difference(&storage(5, &[], &[])).unwrap(), "its ETag was a and is none");
        let now = storage(5, &[("ETag", "a"), ("Last-Modified", "x")], &[]);
        assert_eq!(then.difference(&now).unwrap(), "its Last-Modified was none and is x");
        assert_eq!(then.is_other(&storage(9, &[], &[("inode", "2")])).unwrap(), "its inode was 1 and is 2");
        assert_eq!(then.is_other(&storage(9, &[], &[("time of birth", "7")])), None);
        assert_eq!(then.is_other(&storage(9, &[], &[("inode", "1"), ("time of birth", "7")])), None);
    }
}
