//! Trust: which names found inside an image may be opened.
//!
//! Whoever made an image chose the names in it, and that may be an attacker: a backing file `/etc/shadow` would hand the host's secrets to
//! the guest, `nbd://` would reach into the host's network, a FIFO would hang the process. So a name found inside an image opens only
//!
//! - a regular file, named as a plain path (or `file:` and an absolute one), that after following symbolic links lies in the directory of the image (or below it), or
//! - what the operator allowed by name: a path, everything below a directory, a URI.
//!
//! `null-co://` and `null-aio://`, which open nothing, any image may name.
//!
//! The name is resolved here, once, and what is opened afterwards is the resolved path. A symbolic link that changes in between can therefore
//! not lead out of the directory, unless directories themselves are replaced by someone who may write there anyway.

use headwater_block::{Error, ErrorKind, Result};
use std::fs::FileType;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// What the operator allows beyond the default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    /// Files, and directories with everything below them, that images may name. A block device must be listed itself.
    pub allow: Vec<PathBuf>,
    /// URIs that images may name: exactly these, or, where an entry ends in `/`, those below it.
    pub allow_uris: Vec<String>,
    /// Believe the format that a backing file seems to have when the image doesn't record it. Whoever could write to a raw backing file
    /// decides then what it is read as.
    pub allow_probed_format: bool,
}

impl Trust {
    /// Allows what the operator named on the command line: a path or a URI.
    pub fn allow_source(&mut self, name: &str) {
        match Location::of_operator(name) {
            Location::Path(path) => self.allow.push(path),
            Location::Uri(uri) => self.allow_uris.push(uri),
        }
    }

    /// True if `path`, which is resolved, is one that the operator allowed, or lies below one; `exactly` leaves the latter out.
    fn allows_path(&self, path: &Path, exactly: bool) -> bool {
        self.allow
            .iter()
            .filter_map(|allowed| std::fs::canonicalize(allowed).ok())
            .any(|allowed| if exactly { path == allowed } else { path.starts_with(allowed) })
    }

    fn allows_uri(&self, uri: &str) -> bool {
        self.allow_uris.iter().any(|allowed| {
            uri == allowed
                || allowed.ends_with('/')
                    && uri.strip_prefix(allowed.as_str()).is_some_and(|rest| {
                        // Neither may the rest climb out again, nor carry parameters such as another socket.
                        !rest.contains(['?', '#', '%', '\\']) && rest.split('/').all(|part| part != "..")
                    })
        })
    }
}

/// Where a name leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A path of the local file system.
    Path(PathBuf),
    /// A URI, scheme included.
    Uri(String),
}

impl Location {
    /// What an operator means by `name`: a URI if it has `://`, otherwise a path.
    pub fn of_operator(name: &str) -> Self {
        match scheme(name) {
            Some(scheme) if name[scheme.len()..].starts_with("://") => Location::Uri(name.to_owned()),
            _ => Location::Path(PathBuf::from(name)),
        }
    }

    /// How messages and openers name it.
    pub fn as_name(&self) -> String {
        match self {
            Location::Path(path) => path.to_string_lossy().into_owned(),
            Location::Uri(uri) => uri.clone(),
        }
    }
}

/// The part of `name` before a colon that comes before any slash: what QEMU takes for a protocol.
fn scheme(name: &str) -> Option<&str> {
    let (before, _) = name.split_once(':')?;
    (!before.is_empty() && !before.contains('/')).then_some(before)
}

/// What a name found inside an image is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The image that supplies what an overlay lacks.
    Backing,
    /// The file that holds the guest's data, next to a qcow2 file that holds the metadata only.
    DataFile,
}

impl Role {
    /// How messages call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Backing => "backing file",
            Role::DataFile => "data file",
        }
    }
}

/// Decides about the name `name` that the image at `image` gives for `role`, and says what to open.
///
/// Fails with `NotAllowed` if the operator would have to allow it, and with `NotFound` if there is no such file.
pub fn admit(image: &Location, name: &str, role: Role, trust: &Trust) -> Result<Location> {
    let gate = Gate { image, name, role, trust };
    if name.is_empty() || name.contains('\0') {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!("{}: the name of its {} is malformed: {name:?}", image.as_name(), role.as_str()),
        ));
    }
    // A path, said in another way. (A relative one would start from the working directory, which no image knows.)
    if let Some(path) = name.strip_prefix("file:").filter(|path| path.starts_with('/')) {
        let directory = match image {
            Location::Path(path) => Some(directory_of(path)),
            Location::Uri(_) => None,
        };
        return gate.admit_path(PathBuf::from(path), directory);
    }
    if scheme(name).is_some() {
        return gate.admit_uri(name);
    }
    match image {
        Location::Path(path) => gate.admit_path(directory_of(path).join(name), Some(directory_of(path))),
        Location::Uri(_) if name.starts_with('/') => gate.admit_path(PathBuf::from(name), None),
        Location::Uri(uri) => {
            let directory = uri.rfind('/').map_or(uri.len(), |slash| slash + 1);
            gate.admit_uri(&format!("{}{name}", &uri[..directory]))
        }
    }
}

/// The directory that a relative name in the image at `path` starts from.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Names that lead nowhere: a disk of zeroes.
const NOTHING: [&str; 2] = ["null-co://", "null-aio://"];

/// One decision.
struct Gate<'a> {
    image: &'a Location,
    name: &'a str,
    role: Role,
    trust: &'a Trust,
}

impl Gate<'_> {
    fn admit_uri(&self, uri: &str) -> Result<Location> {
        if NOTHING.contains(&uri) || self.trust.allows_uri(uri) {
            return Ok(Location::Uri(uri.to_owned()));
        }
        let why = match scheme(uri) {
            Some("json") => "it is a json: description, which could name anything",
            _ if uri.contains("://") => "it reaches over the network or to another program",
            _ => "it names a protocol (a file whose name has a colon is written ./NAME)",
        };
        Err(self.refuse(why, uri))
    }

    fn admit_path(&self, path: PathBuf, directory: Option<&Path>) -> Result<Location> {
        let real = std::fs::canonicalize(&path).map_err(|err| self.unreachable(err, &path))?;
        // Not opened to find out: opening a FIFO or a tape has effects.
        let kind = std::fs::metadata(&real).map_err(|err| self.unreachable(err, &path))?.file_type();
        let real_name = real.to_string_lossy();
        let device_allowed = kind.is_block_device() && self.trust.allows_path(&real, true);
        if !kind.is_file() && !device_allowed {
            return Err(self.refuse(what_it_is(kind), &real_name));
        }
        let inside = directory
            .and_then(|directory| std::fs::canonicalize(directory).ok())
            .is_some_and(|directory| real.starts_with(directory));
        if inside || self.trust.allows_path(&real, false) {
            return Ok(Location::Path(real));
        }
        let why = format!("it leads to {real_name}, outside the image's directory");
        Err(self.refuse(&why, &real_name))
    }

    fn refuse(&self, why: &str, remedy: &str) -> Error {
        let (image, name, role) = (self.image.as_name(), self.name, self.role.as_str());
        Error::new(
            ErrorKind::NotAllowed,
            format!(
                "{image}: its {role} {name:?} is not opened, because {why}, and nobody but the image asked for it; if you trust it, \
                 allow it with --allow-backing {remedy:?}"
            ),
        )
    }

    fn unreachable(&self, err: std::io::Error, path: &Path) -> Error {
        let (image, role) = (self.image.as_name(), self.role.as_str());
        let remedy = "put it there, or record where it is with qemu-img rebase -u";
        Error::from_io(err, format!("open {}, the {role} of {image} ({remedy})", path.display()))
    }
}

/// Why something that isn't a regular file is refused.
fn what_it_is(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "it is a directory"
    } else if kind.is_fifo() {
        "it is a FIFO"
    } else if kind.is_socket() {
        "it is a socket"
    } else if kind.is_block_device() {
        "it is a block device"
    } else {
        "it is a device"
    }
}

#[cfg(test)]
mod tests;
