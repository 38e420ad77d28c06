//! An object in S3, Google Cloud Storage or Azure as a read-only node.
//!
//! - [`ObjectLocation`]: its address. [`Keys`]: who asks for it, where that isn't left to the environment.
//! - [`open`], here. `store`: from both to clients of the crate `object_store`, which knows the protocols. `aws_files`: what it doesn't read.
//! - `source`: ranges of the object, tried until they are there, at another endpoint if one fails. `refusal`: what an answer without them means.
//! - `connector`: the crate's requests go over the connections of [`http`](crate::http); the node is [`HttpNode`], with its splitting and its
//!   cache.
//!
//! The object is pinned when it is opened: its size, ETag, time of modification and version. Each request carries the ETag (or the time)
//! as a condition, each answer is compared, and once a difference was seen the node fails for good with `SourceChanged`.

mod aws_files;
mod connector;
mod location;
mod refusal;
mod source;
mod store;

pub use self::location::{ObjectLocation, Service};
use crate::http::{HttpNode, HttpOptions};
use headwater_block::Result;
use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;
use tokio::time::Instant;

/// Who asks for an object.
#[derive(Clone)]
pub enum Keys {
    /// Whom the environment names, and the files that it names: as the tools of these services have it.
    Environment,
    /// S3.
    S3 {
        /// The access key's id.
        id: String,
        /// The secret access key.
        secret: String,
        /// The token of a session.
        token: Option<String>,
    },
    /// Google Cloud: the JSON of a service account's key.
    ServiceAccount(String),
    /// Azure: the storage account's key, in base64.
    AzureKey(String),
    /// Azure: a shared access signature.
    AzureSas(String),
}

/// Shows nothing secret.
impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Environment => "Environment",
            Self::S3 { .. } => "S3",
            Self::ServiceAccount(_) => "ServiceAccount",
            Self::AzureKey(_) => "AzureKey",
            Self::AzureSas(_) => "AzureSas",
        })
    }
}

/// The files that credentials for `service` may be read from, whether they exist or not: for a sandbox.
pub fn credential_files(service: Service) -> Vec<PathBuf> {
    store::files(service)
}

/// Opens an object and pins it. The node lives in the `LocalSet` in which this is called: its tasks run there.
///
/// # Errors
/// `InvalidInput` for settings that contradict each other, `Unavailable` or `TimedOut` if no endpoint can be reached, `NotFound` and
/// `PermissionDenied` as the store says, `Unsupported` if it can't send parts of an object, `Corrupt` if its answers contradict themselves.
pub async fn open(location: &ObjectLocation, keys: &Keys, options: HttpOptions) -> Result<Rc<HttpNode>> {
    location.check()?;
    let depth = options.connections.clamp(1, 256);
    let options = HttpOptions { connections: depth, ..options };
    let begun = Instant::now();
    let (source, first) = source::ObjectSource::open(location, keys, options).await?;
    let driver = location.service.scheme();
    Ok(HttpNode::over(Rc::new(source), &location.to_string(), driver, depth, first, begun.elapsed()))
}

/// What is behind an error of the crate `object_store`: its own texts repeat addresses, and add nothing.
fn deepest(err: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = err;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
