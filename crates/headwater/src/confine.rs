//! What the verbs other than `daemon` give up before they look at an image: writing where their command line names nothing, and running
//! programs.
//!
//! Each says what it writes; directories, because images are replaced, and records and sockets made beside them. What is opened for reading isn't
//! restricted: where a chain of images leads is `open_gate`'s business.

use crate::address::Address;
use crate::source::is_uri;
use headwater_nbd::NbdAddress;
use std::path::{Path, PathBuf};

/// What a command writes.
#[derive(Default)]
pub(crate) struct Writes {
    below: Vec<PathBuf>,
    only: Vec<PathBuf>,
    /// It needs what can't be had afterwards.
    free: bool,
}

impl Writes {
    /// An image or another file, there or not. Names of other places than files mean nothing.
    pub(crate) fn file(mut self, path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        if path.to_str().is_some_and(is_uri) {
            return self;
        }
        match path.canonicalize() {
            Ok(found) if found.is_dir() => self.below.push(found),
            Ok(found) => {
                if found.is_file() {
                    self.below.extend(found.parent().map(Path::to_owned));
                }
                self.only.push(found);
                // What is beside a link is looked for there.
                self.below.extend(existing(path.parent()).filter(|parent| parent != Path::new("/dev")));
            }
            Err(_) => self.below.extend(existing(path.parent())),
        }
        self
    }

    /// A file if it is given.
    pub(crate) fn optional(self, path: Option<&Path>) -> Self {
        match path {
            Some(path) => self.file(path),
            None => self,
        }
    }

    /// A directory that is made if it isn't there.
    pub(crate) fn directory(mut self, path: Option<&Path>) -> Self {
        self.below.extend(path.and_then(|path| existing(Some(path))));
        self
    }

    /// Names that images may use, which may be those of external data files.
    pub(crate) fn allowed(self, names: &[String]) -> Self {
        names.iter().fold(self, |writes, name| writes.file(name))
    }

    /// Where a disk is served.
    pub(crate) fn addresses(self, addresses: &[Address]) -> Self {
        addresses.iter().fold(self, |mut writes, address| match address {
            Address::Nbd(uri) => match &uri.address {
                NbdAddress::Unix { path } => writes.file(path),
                NbdAddress::Tcp { .. } => writes,
            },
            Address::VhostUserBlk(machine) => writes.file(&machine.path),
            Address::Activated(_) => writes,
            // To mount, to run fusermount3, and to open devices whose names the kernel chooses.
            Address::Fuse(_) | Address::Ublk(_) => {
                writes.free = true;
                writes
            }
        })
    }

    /// Gives up everything else, as far as the kernel lets it: before there are other threads.
    pub(crate) fn confine(self) {
        if self.free {
            return;
        }
        if let Err(why) = headwater_sandbox::confine(&self.below, &self.only) {
            tracing::debug!("not confined: {why}");
        }
    }
}

/// The directory at `path`, or if it isn't there the next one above that is.
fn existing(path: Option<&Path>) -> Option<PathBuf> {
    path?.ancestors().find_map(|path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        path.canonicalize().ok()
    })
}
