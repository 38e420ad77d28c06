//! Opens the node that a name leads to: a path, or the address of a server.
//!
//! Names come from the operator here. Whether a name that was found inside an image may be opened is decided elsewhere, before.

use crate::file::{Engine, FileNode, FileOptions};
use crate::http::{HttpNode, HttpOptions};
use crate::nbd::{NbdNode, NbdOptions};
use crate::object::{self, Keys, ObjectLocation};
use headwater_block::{Error, ErrorKind, Node, Result};
use headwater_nbd::NbdUri;
use std::rc::Rc;

/// What can be opened, for messages.
const SUPPORTED: &str = "nbd://HOST[:PORT]/EXPORT, nbd+unix:///EXPORT?socket=PATH, nbds for either, http://HOST/PATH, https://HOST/PATH, s3://BUCKET/KEY, gs://BUCKET/KEY, az://CONTAINER/KEY, or a path (or file:PATH)";

/// How to open whatever a name leads to.
#[derive(Clone)]
pub struct OpenOptions {
    /// What does the work of files.
    pub engine: Rc<Engine>,
    /// For files.
    pub file: FileOptions,
    /// For exports of NBD servers.
    pub nbd: NbdOptions,
    /// For files behind HTTP servers and in object stores.
    pub http: HttpOptions,
}

impl OpenOptions {
    /// The defaults of all kinds: for writing where that is possible.
    pub fn new(engine: Rc<Engine>) -> Self {
        Self {
            engine,
            file: FileOptions::default(),
            nbd: NbdOptions::default(),
            http: HttpOptions::default(),
        }
    }

    /// The same, refusing changes or not.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.file.read_only = read_only;
        self.nbd.read_only = read_only;
        self
    }
}

/// Opens what `name` leads to. Must be called within the `LocalSet` in which the node is to live.
///
/// # Errors
/// `Unsupported` for a scheme that isn't known, `InvalidInput` for an address that is malformed, and what [`FileNode::open`],
/// [`NbdNode::connect`], [`HttpNode::open`] and [`object::open`] say.
pub async fn open_protocol(name: &str, options: &OpenOptions) -> Result<Rc<dyn Node>> {
    let refuse = |kind, why: String| Err(Error::new(kind, format!("cannot open {name:?}: {why}")));
    if NbdUri::is_nbd(name) {
        return Ok(NbdNode::connect(name, options.nbd.clone()).await?);
    }
    if ObjectLocation::is_object(name) {
        // Credentials are those of the environment.
        return Ok(object::open(&name.parse()?, &Keys::Environment, options.http.clone()).await?);
    }
    let path = match name.split_once(':') {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("file") => match rest.strip_prefix("//") {
            None => rest,
            Some(local) if local.starts_with('/') => local,
            Some(_) => {
                let why = "file:// takes no host; write file:PATH or file:///PATH".to_owned();
                return refuse(ErrorKind::InvalidInput, why);
            }
        },
        Some((scheme, rest)) if rest.starts_with("//") && !scheme.contains('/') => {
            if scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https") {
                return Ok(HttpNode::open(name, options.http.clone()).await?);
            }
            let why = format!("{scheme}:// is not supported; supported are {SUPPORTED}");
            return refuse(ErrorKind::Unsupported, why);
        }
        Some((scheme @ ("json" | "nbd"), _)) => {
            let why = format!("names that begin with {scheme}: are not supported; supported are {SUPPORTED}");
            return refuse(ErrorKind::Unsupported, why);
        }
        _ => name,
    };
    if path.is_empty() {
        return refuse(ErrorKind::InvalidInput, "the path is empty".to_owned());
    }
    Ok(FileNode::open(&options.engine, path, options.file)?)
}
