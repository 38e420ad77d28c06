//! SOURCE with its mirrors and its manifest: what `--mirror` and `--verify` make of the storage below its format.
//!
//! Each of the places is a replica of one file. It is opened when it can be, checked against the manifest for itself, and compared with what is remembered
//! of it from an earlier run, so that one that comes late isn't another one.

use crate::cli::stream::MirrorArgs;
use crate::durable::storage::Storage;
use crate::failure::{Failure, Outcome};
use crate::opener::open_storage;
use headwater_block::filter::replicas::{Candidate, ReplicasOptions};
use headwater_block::filter::verify::Verification;
use headwater_block::filter::{ReplicasNode, VerifyNode};
use headwater_block::manifest::hex;
use headwater_block::{
    Disk, DiskOptions, Edge, Error, ErrorKind, LocalFuture, Manifest, Node, Result, TokioClock,
};
use headwater_image::open_gate::Location;
use headwater_storage::open::OpenOptions;
use serde::Serialize;
use std::cell::RefCell;
use std::io::BufReader;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// For how long a mirror tries a request again by itself: a connection that was lost is made anew, but a server that is gone is left to the others.
const RETRY: Duration = Duration::from_millis(500);

/// What there is to know about mirrors while a stream runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MirrorsStatus {
    /// SOURCE first, then the mirrors.
    pub sources: Vec<MirrorStatus>,
    /// Reads that were sent to a second source because the first was slow.
    pub hedges: u64,
    /// Hedges that were answered first.
    pub hedges_won: u64,
    /// Requests that went on to another source because one failed or stalled.
    pub failovers: u64,
}

/// What there is to know about one of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MirrorStatus {
    /// As it was named.
    pub name: String,
    /// "good", "left" until it is well again, or "distrusted" for good.
    pub state: &'static str,
    /// Why it isn't good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Requests that it was sent.
    pub reads: u64,
    /// Bytes that it brought.
    pub bytes: u64,
    /// Requests that it failed.
    pub failures: u64,
    /// How often it was left.
    pub left: u64,
    /// In milliseconds, as measured of late.
    pub latency_ms: f64,
    /// In bytes a second, as measured of late.
    pub rate: f64,
}

/// See the module.
pub struct Mirrors {
    /// SOURCE first.
    names: Vec<String>,
    verification: Option<Rc<Verification>>,
    replicas: RefCell<Option<Rc<ReplicasNode>>>,
    /// What each must be, by name.
    pins: Rc<RefCell<Vec<Storage>>>,
}

impl Mirrors {
    /// What `args` say of `source`; none if they say nothing.
    ///
    /// # Errors
    /// If the manifest can't be read or is no use, or there are too many mirrors.
    pub fn new(source: &str, args: &MirrorArgs) -> Outcome<Option<Rc<Self>>> {
        if args.mirror.is_empty() && args.verify.is_none() {
            return Ok(None);
        }
        let most = headwater_block::filter::replicas::MOST_REPLICAS - 1;
        if args.mirror.len() > most {
            return Err(Failure::usage(format!(
                "{} mirrors are too many; {most} can be used",
                args.mirror.len()
            )));
        }
        let verification = match &args.verify {
            Some(path) => Some(Verification::new(read_manifest(path)?)),
            None => None,
        };
        let names = std::iter::once(source.to_owned()).chain(args.mirror.iter().cloned()).collect();
        let (replicas, pins) = (RefCell::default(), Rc::default());
        Ok(Some(Rc::new(Self { names, verification, replicas, pins })))
    }

    /// True if `name`, as an image is found by, is SOURCE.
    pub fn is_source(&self, name: &str) -> bool {
        name == self.names[0] || name == Location::of_operator(&self.names[0]).as_name()
    }

    /// True if `name` is SOURCE or a mirror.
    pub fn names(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }

    /// All of them, SOURCE first.
    pub fn all(&self) -> &[String] {
        &self.names
    }

    /// What is verified.
    pub fn verification(&self) -> Option<&Rc<Verification>> {
        self.verification.as_ref()
    }

    /// The manifest's root.
    pub fn root(&self) -> Option<String> {
        Some(hex(self.verification.as_ref()?.manifest().root()))
    }

    /// The node that reads SOURCE through all that are there.
    ///
    /// # Errors
    /// If none can be opened, or they are not the same.
    pub(crate) async fn open(&self, options: OpenOptions) -> Result<Rc<dyn Node>> {
        if self.names.len() == 1 {
            let name = &self.names[0];
            return Ok(reach(name, &options, self.verification.clone(), &self.pins).await?.disk().top());
        }
        let retry = options.http.retry;
        let mut options = options;
        options.http.retry = RETRY.min(retry);
        options.nbd.retry = RETRY.min(options.nbd.retry);
        let candidate = |name: &String| {
            let (name, options) = (name.clone(), options.clone());
            let (verification, pins) = (self.verification.clone(), self.pins.clone());
            let shown = name.clone();
            let reach = Box::new(move || -> LocalFuture<'static, Result<Rc<Edge>>> {
                let (name, options) = (name.clone(), options.clone());
                let (verification, pins) = (verification.clone(), pins.clone());
                Box::pin(async move { reach(&name, &options, verification, &pins).await })
            });
            Candidate { name: shown, reach }
        };
        let candidates = self.names.iter().map(candidate).collect();
        let clock = Rc::new(TokioClock::new());
        let node = ReplicasNode::open(candidates, clock, ReplicasOptions { retry }).await?;
        tokio::task::spawn_local(ReplicasNode::attend(Rc::downgrade(&node)));
        self.replicas.replace(Some(node.clone()));
        Ok(node)
    }

    /// Each of them that is open, by name; none if there is only SOURCE.
    pub fn open_nodes(&self) -> Vec<(String, Rc<dyn Node>)> {
        self.replicas.borrow().as_ref().map(|node| node.open_nodes()).unwrap_or_default()
    }

    /// Those that are opened from now on must be as these are.
    pub fn pin(&self, known: &[Storage]) {
        self.pins.replace(known.to_vec());
    }

    /// What has happened since the last time, for people.
    pub fn news(&self) -> Vec<String> {
        let events = self.replicas.borrow().as_ref().map(|node| node.take_events()).unwrap_or_default();
        events.iter().map(ToString::to_string).collect()
    }

    /// What there is to know about them; none if there is only SOURCE.
    pub fn status(&self) -> Option<MirrorsStatus> {
        let replicas = self.replicas.borrow();
        let node = replicas.as_ref()?;
        let sources = node.report().into_iter().map(|replica| MirrorStatus {
            name: replica.name,
            state: replica.state,
            error: replica.error,
            reads: replica.reads,
            bytes: replica.bytes,
            failures: replica.failures,
            left: replica.left,
            latency_ms: replica.latency * 1e3,
            rate: replica.rate.round(),
        });
        let counters = node.counters();
        Some(MirrorsStatus {
            sources: sources.collect(),
            hedges: counters.hedges.get(),
            hedges_won: counters.hedges_won.get(),
            failovers: counters.failovers.get(),
        })
    }
}

/// Opens one of them.
async fn reach(
    name: &str,
    options: &OpenOptions,
    verification: Option<Rc<Verification>>,
    pins: &RefCell<Vec<Storage>>,
) -> Result<Rc<Edge>> {
    let mut node = open_storage(name, options).await?;
    if let Some(verification) = verification {
        node = VerifyNode::new(edge(node), verification)?;
    }
    let pinned = pins.borrow().iter().find(|storage| storage.name == name).cloned();
    if let Some(pinned) = pinned {
        let now = Storage::constant(name, &*node).await?;
        if let Some(difference) = pinned.difference(&now) {
            let message = format!("{name} has changed since the disk was begun: {difference}");
            return Err(Error::new(ErrorKind::WrongContent, message));
        }
    }
    Ok(edge(node))
}

fn edge(node: Rc<dyn Node>) -> Rc<Edge> {
    let options = DiskOptions { read_only: true, ..DiskOptions::default() };
    Edge::new(Disk::new(node, Rc::new(TokioClock::new()), options))
}

/// Reads a manifest from a file.
///
/// # Errors
/// If it can't be read, or is no use.
pub fn read_manifest(path: &Path) -> Result<Manifest> {
    let shown = path.display().to_string();
    let file = std::fs::File::open(path).map_err(|err| Error::from_io(err, format_args!("open {shown}")))?;
    Manifest::read(BufReader::new(file), &shown)
}
