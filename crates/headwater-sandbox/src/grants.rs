//! What the data plane may reach: what the operator named, and what follows from it.
//!
//! | the operator named | granted |
//! |---|---|
//! | an image, a raw disk | opening and making it, reading its directory's entries (to make a new name durable), and of an image once the broker has read its header what that names |
//! | a file or socket | opening, making, connecting, listening there |
//! | a file that is replaced | making and removing `.NAME.NUMBER.new` beside it, and giving that its name |
//! | a file of credentials | reading it, if it is a regular file |
//! | a directory of files to read (certificates) | reading regular files directly in it |
//! | a directory for state | everything in it |
//! | a file to be mounted over | mounting FUSE there, opening its device, unmounting |
//! | what images may name (`--allow-backing`) | opening what is there: it, or regular files below it |
//!
//! Removed is only what the data plane made, what it makes to replace a file, and sockets. Names are compared as they are written, made absolute: who names a symbolic link
//! means what it leads to. What an image names was resolved when it was admitted, so that no link may be on its way any more.
//!
//! Besides, there are the few files of the system that everybody may read, which looking up a host or a certificate takes ([`is_of_system`]).
//!
//! What was said stays said: names are not taken back when a node is removed, because a job may still hold it.

use crate::call::Address;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

/// Something that the operator said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// A file that holds an image, or is to. Its header may name others.
    Image(PathBuf),
    /// A file that holds a disk as it is. Whatever its bytes look like, the guest may have written them.
    Raw(PathBuf),
    /// A file or socket that is used as it is; also the name of an abstract socket.
    File(PathBuf),
    /// A file that is read and never changed.
    Readable(PathBuf),
    /// A file that another takes the place of, which is made beside it under a name of its own ([`new_name`]).
    Replaced(PathBuf),
    /// A file that the data plane keeps for as long as it runs, and removes.
    Own(PathBuf),
    /// What a header is to say of the image's backing file: read from the image's directory, if it is relative.
    Backing(PathBuf),
    /// A file over which a disk is mounted.
    MountPoint(PathBuf),
    /// A directory with files to read.
    Directory(PathBuf),
    /// A directory that is the data plane's own. It must exist.
    State(PathBuf),
    /// A file that images may name, or a directory with what is below it.
    Allowed(PathBuf),
}

/// A file that an image's header names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Where it is: resolved, without symbolic links.
    pub path: PathBuf,
    /// It is an image with a header, which may name others.
    pub header: bool,
}

/// How the broker opens a file for the data plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) path: PathBuf,
    /// Symbolic links are followed.
    pub(crate) links: bool,
    /// It must be a regular file.
    pub(crate) regular: bool,
    /// Its header is to be read first; what that names goes to [`Grants::found`].
    pub(crate) look: bool,
}

/// What may be reached.
#[derive(Debug)]
pub struct Grants {
    here: PathBuf,
    /// Files and sockets, as they were named.
    files: HashSet<PathBuf>,
    /// The same, as bytes: names of abstract sockets.
    abstract_names: HashSet<Vec<u8>>,
    /// Images, as they were named; true for those whose headers are to be read when they are opened next.
    images: HashMap<PathBuf, bool>,
    /// What headers named, resolved.
    found: HashMap<PathBuf, bool>,
    readable: HashSet<PathBuf>,
    replaced: HashSet<PathBuf>,
    backing: HashSet<PathBuf>,
    mount_points: HashSet<PathBuf>,
    directories: HashSet<PathBuf>,
    state: HashSet<PathBuf>,
    allowed: HashSet<PathBuf>,
    /// Files that are the data plane's own.
    own: HashSet<PathBuf>,
    /// What was made by the data plane.
    made: HashSet<PathBuf>,
    /// Ports at which monitors are reached.
    monitors: HashSet<u16>,
}

impl Grants {
    /// Nothing is granted. Relative names start at `here`, an absolute path.
    pub fn new(here: PathBuf) -> Self {
        Self {
            here,
            files: HashSet::new(),
            abstract_names: HashSet::new(),
            images: HashMap::new(),
            found: HashMap::new(),
            readable: HashSet::new(),
            replaced: HashSet::new(),
            backing: HashSet::new(),
            mount_points: HashSet::new(),
            directories: HashSet::new(),
            state: HashSet::new(),
            allowed: HashSet::new(),
            own: HashSet::new(),
            made: HashSet::new(),
            monitors: HashSet::new(),
        }
    }

    /// Grants what follows from a word of the operator's.
    pub fn hear(&mut self, word: Word) {
        match word {
            Word::Image(path) => drop(self.images.insert(self.absolute(&path), true)),
            Word::Raw(path) => drop(self.images.entry(self.absolute(&path)).or_insert(false)),
            Word::File(path) => {
                self.abstract_names.insert(path.as_os_str().as_bytes().to_vec());
                self.files.insert(self.absolute(&path));
            }
            Word::Readable(path) => drop(self.readable.insert(self.absolute(&path))),
            Word::Replaced(path) => drop(self.replaced.insert(self.absolute(&path))),
            Word::Own(path) => {
                let path = self.absolute(&path);
                self.own.insert(path.clone());
                self.made.insert(path.clone());
                self.files.insert(path);
            }
            Word::Backing(path) => drop(self.backing.insert(path)),
            Word::MountPoint(path) => drop(self.mount_points.insert(self.absolute(&path))),
            Word::Directory(path) => drop(self.directories.insert(self.absolute(&path))),
            Word::State(path) => {
                self.state.extend(std::fs::canonicalize(self.here.join(path)));
            }
            Word::Allowed(path) => drop(self.allowed.insert(self.absolute(&path))),
        }
    }

    /// Keeps the data plane from a TCP port of a monitor: it may neither connect to it on this machine nor listen there. It would be its own
    /// operator.
    pub fn keep_from(&mut self, port: u16) {
        self.monitors.insert(port);
    }

    /// The header of the image at `path` was read, and names these files.
    pub(crate) fn found(&mut self, path: &Path, named: Vec<Named>) {
        for unread in [self.images.get_mut(path), self.found.get_mut(path)].into_iter().flatten() {
            *unread = false;
        }
        for Named { path, header } in named {
            self.found.entry(path).or_insert(header);
        }
    }

    /// The file at `path` wasn't there, and was made.
    pub(crate) fn made(&mut self, path: PathBuf) {
        self.made.insert(path);
    }

    /// `path` as grants compare it: absolute, without `.` and double slashes.
    pub(crate) fn absolute(&self, path: &Path) -> PathBuf {
        self.here.join(path).components().collect()
    }

    /// Whether and how to open `path`, which is [absolute](Grants::absolute). Errors: `ACCESS`.
    pub(crate) fn open(&mut self, path: &Path, flags: OFlags) -> Result<Grant, Errno> {
        let makes = flags.intersects(OFlags::CREATE | OFlags::TRUNC);
        let reads = !makes && flags & OFlags::RWMODE == OFlags::RDONLY;
        let path = path.to_owned();
        let grant = |path, links, regular, look| Ok(Grant { path, links, regular, look });
        if let Some(look) = self.images.get(&path).copied() {
            return grant(path, true, false, look);
        }
        if self.files.contains(&path) || (path == Path::new(NOTHING) && !makes) {
            return grant(path, true, false, false);
        }
        if self.is_replacement(&path) {
            return grant(path, true, true, false);
        }
        if path == Path::new(FUSE) && !makes && !self.mount_points.is_empty() {
            return grant(path, false, false, false);
        }
        if let Some(look) = self.found.get(&path).copied() {
            return if makes { Err(Errno::ACCESS) } else { grant(path, false, false, look) };
        }
        if let Some(inside) = self.in_state(&path) {
            return grant(inside, false, false, false);
        }
        if reads {
            let listed = flags.contains(OFlags::DIRECTORY);
            if is_of_system(&path) || (listed && self.is_listed(&path)) {
                return grant(path, true, false, false);
            }
            let listed = path.parent().is_some_and(|parent| self.directories.contains(parent));
            if listed || self.readable.contains(&path) {
                return grant(path, true, true, false);
            }
        }
        if makes {
            return Err(Errno::ACCESS);
        }
        if let Some(regular) = self.is_allowed(&path) {
            self.found.entry(path.clone()).or_insert(true);
            return grant(path, false, regular, true);
        }
        if self.is_announced(&path) {
            self.found.entry(path.clone()).or_insert(true);
            return grant(path, false, true, true);
        }
        Err(Errno::ACCESS)
    }

    /// Whether the entry at `path` may be removed, and where it is. Errors: `ACCESS`.
    pub(crate) fn remove(&self, path: &Path) -> Result<PathBuf, Errno> {
        if let Some(inside) = self.in_state(path) {
            return Ok(inside);
        }
        if self.is_replacement(path) {
            return Ok(path.to_owned());
        }
        let named = self.images.contains_key(path) || self.files.contains(path);
        let socket = || path.symlink_metadata().is_ok_and(|metadata| metadata.file_type().is_socket());
        if named && (self.made.contains(path) || socket()) { Ok(path.to_owned()) } else { Err(Errno::ACCESS) }
    }

    /// Whether `from` may become `to`, and where they are. Errors: `ACCESS`.
    pub(crate) fn rename(&self, from: &Path, to: &Path) -> Result<(PathBuf, PathBuf), Errno> {
        let own = self.own.contains(from) && self.own.contains(to);
        if own || self.replaced.contains(to) && is_new_name(from, to) {
            return Ok((from.to_owned(), to.to_owned()));
        }
        self.in_state(from).zip(self.in_state(to)).ok_or(Errno::ACCESS)
    }

    /// True for the name under which what takes the place of a file is made.
    fn is_replacement(&self, path: &Path) -> bool {
        self.replaced.iter().any(|to| is_new_name(path, to))
    }

    /// Whether a connection to `address` may be made. Errors: `ACCESS`.
    pub(crate) fn connect(&self, address: &Address) -> Result<(), Errno> {
        let granted = match address {
            Address::Inet(to) => !(self.monitors.contains(&to.port()) && is_of_this_machine(*to)),
            Address::Path(path) => {
                SERVICES.iter().any(|service| path == Path::new(service))
                    || self.files.contains(&self.absolute(path))
            }
            Address::Abstract(name) => self.names_abstract(name),
            Address::Unspecified => true,
        };
        if granted { Ok(()) } else { Err(Errno::ACCESS) }
    }

    /// Whether a socket may be bound to `address`. Errors: `ACCESS`.
    pub(crate) fn bind(&self, address: &Address) -> Result<(), Errno> {
        let granted = match address {
            Address::Inet(at) => !self.monitors.contains(&at.port()),
            Address::Path(path) => self.files.contains(&self.absolute(path)),
            Address::Abstract(name) => self.names_abstract(name),
            Address::Unspecified => false,
        };
        if granted { Ok(()) } else { Err(Errno::ACCESS) }
    }

    /// Whether a disk may be mounted over the file at `path`, and taken away again. Errors: `ACCESS`.
    pub(crate) fn mount(&self, path: &Path) -> Result<(), Errno> {
        if self.mount_points.contains(path) { Ok(()) } else { Err(Errno::ACCESS) }
    }

    fn names_abstract(&self, name: &[u8]) -> bool {
        // One that isn't tight is filled up with zeroes.
        let end = name.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        self.abstract_names.contains(name) || self.abstract_names.contains(&name[..end])
    }

    /// Where in a directory for state `path` lies.
    fn in_state(&self, path: &Path) -> Option<PathBuf> {
        let climbs = path.components().any(|part| part == Component::ParentDir);
        if climbs || self.state.is_empty() {
            return None;
        }
        let parent = std::fs::canonicalize(path.parent()?).ok()?;
        let inside = parent.join(path.file_name()?);
        self.state.iter().any(|state| inside != *state && inside.starts_with(state)).then_some(inside)
    }

    /// A directory whose entries may be read.
    fn is_listed(&self, path: &Path) -> bool {
        self.directories.contains(path)
            || self.state.contains(path)
            || self.images.keys().any(|image| image.parent() == Some(path))
    }

    /// Whether `path`, resolved, is one that images may name; then, whether it must be a regular file.
    fn is_allowed(&self, path: &Path) -> Option<bool> {
        let allowed = self.allowed.iter().filter_map(|allowed| std::fs::canonicalize(allowed).ok());
        let over = allowed.filter(|allowed| path.starts_with(allowed));
        over.map(|allowed| path != allowed).min()
    }

    /// Whether the operator said what a header is to name, and it is `path`.
    fn is_announced(&self, path: &Path) -> bool {
        let directories: HashSet<&Path> =
            self.images.keys().chain(self.found.keys()).filter_map(|image| image.parent()).collect();
        self.backing.iter().any(|name| {
            directories
                .iter()
                .any(|directory| std::fs::canonicalize(directory.join(name)).is_ok_and(|real| real == path))
        })
    }
}

/// The name beside `path` under which what is to replace it is made; `number` tells apart those who do it at the same time. None if `path` has no name.
pub fn new_name(path: &Path, number: u32) -> Option<PathBuf> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name()?);
    name.push(format!(".{number}.new"));
    Some(path.with_file_name(name))
}

/// True if `from` is a [`new_name`] of `to`.
fn is_new_name(from: &Path, to: &Path) -> bool {
    let number = || {
        let name = from.file_name()?.to_str()?.strip_suffix(".new")?;
        name.rsplit_once('.')?.1.parse().ok()
    };
    number().is_some_and(|number| new_name(to, number).is_some_and(|name| name == from))
}

/// Services of this machine that the C library asks for the addresses of hosts.
const SERVICES: [&str; 3] =
    ["/run/systemd/resolve/io.systemd.Resolve", "/run/nscd/socket", "/var/run/nscd/socket"];

/// The device that takes everything and gives nothing.
const NOTHING: &str = "/dev/null";

/// The device from which a FUSE file system's requests are read.
const FUSE: &str = "/dev/fuse";

/// Files that looking up a host takes, and those that the C library's memory does.
const SYSTEM_FILES: [&str; 10] = [
    "/etc/gai.conf",
    "/etc/host.conf",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/nsswitch.conf",
    "/etc/resolv.conf",
    "/etc/services",
    "/etc/localtime",
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu/online",
];

/// Where distributions keep the certificates that everybody trusts; not `/etc/ssl` as a whole, which has keys below it.
const CERTIFICATES: [&str; 9] = [
    "/etc/ssl/certs",
    "/etc/ssl/cert.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/certs",
    "/etc/pki/tls/cert.pem",
    "/etc/pki/ca-trust/extracted",
    "/etc/ca-certificates/extracted",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
];

/// Where modules of the C library are, for names of hosts.
const LIBRARIES: [&str; 5] = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"];

/// What everybody may read.
fn is_of_system(path: &Path) -> bool {
    if path.components().any(|part| part == Component::ParentDir) {
        return false;
    }
    let below = |places: &[&str]| places.iter().any(|place| path.starts_with(place));
    let name = path.file_name().unwrap_or_default().as_bytes();
    let library = name.ends_with(b".so") || name.windows(4).any(|part| part == b".so.");
    SYSTEM_FILES.iter().any(|file| path == Path::new(file))
        || below(&CERTIFICATES)
        || (library && below(&LIBRARIES))
        || is_read_only_flag(path)
}

/// `/sys/dev/block/MAJOR:MINOR/ro`: whether a device takes writes.
fn is_read_only_flag(path: &Path) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    path.to_str()
        .and_then(|path| path.strip_prefix("/sys/dev/block/")?.strip_suffix("/ro")?.split_once(':'))
        .is_some_and(|(major, minor)| number(major) && number(minor))
}

/// True if a connection to `address` ends on this machine.
fn is_of_this_machine(address: SocketAddr) -> bool {
    let ip = address.ip().to_canonical();
    // Only addresses of ours can be bound, whoever asks.
    let local = |ip: IpAddr| UdpSocket::bind((ip, 0)).is_ok();
    ip.is_loopback() || ip.is_unspecified() || local(ip) || local(address.ip())
}

#[cfg(test)]
mod tests;
