//! The broker's side of the calls that stop: it decides, and makes them.

use crate::call::{Address, Request, Start};
use crate::grants::{Grant, Grants, Named};
use crate::memory::Memory;
use crate::sys::{Listener, Stopped};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Reads the header of an image, and says which files it names that may be opened because of it, resolved. The file is the data plane's
/// already: its position must stay where it is.
pub type Names = Box<dyn Fn(&File, &Path) -> Vec<Named> + Send>;

/// Flags of open that are passed on. The others do what nobody needs here.
const FLAGS: OFlags = OFlags::RWMODE
    .union(OFlags::APPEND)
    .union(OFlags::CLOEXEC)
    .union(OFlags::CREATE)
    .union(OFlags::DIRECT)
    .union(OFlags::DIRECTORY)
    .union(OFlags::DSYNC)
    .union(OFlags::EXCL)
    .union(OFlags::LARGEFILE)
    .union(OFlags::NOCTTY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::SYNC)
    .union(OFlags::TRUNC);

/// So many refusals are told of; a data plane that is refused more is no longer ours, and would only fill the log.
const TOLD: u32 = 64;

/// Makes calls for the data plane.
pub(crate) struct Desk {
    pub(crate) listener: Listener,
    pub(crate) memory: Memory,
    /// The data plane's process.
    pub(crate) caller: OwnedFd,
    pub(crate) grants: Arc<Mutex<Grants>>,
    pub(crate) names: Names,
    pub(crate) refused: u32,
}

impl Desk {
    /// Makes calls until there can be none any more.
    pub(crate) fn serve(mut self) {
        loop {
            match self.listener.receive() {
                Ok(call) => {
                    // If the caller is gone, so is its need.
                    let _ = self.carry_out(&call);
                }
                Err(err) if matches!(err.kind(), ErrorKind::Interrupted | ErrorKind::NotFound) => {}
                Err(err) => {
                    tracing::error!("no file can be opened any more: {err}");
                    return;
                }
            }
        }
    }

    fn carry_out(&mut self, call: &Stopped) -> std::io::Result<()> {
        let request = match Request::decode(call, &self.memory) {
            Ok(request) => request,
            Err(errno) => return self.listener.answer(call.id, Err(errno)),
        };
        let done = match &request {
            Request::Open { start, path, flags, mode } => match self.open(*start, path, *flags, *mode) {
                Ok(file) => {
                    let cloexec = flags.contains(OFlags::CLOEXEC);
                    return match self.listener.hand_over(call.id, file.as_fd(), cloexec) {
                        // The caller has no room for another descriptor.
                        Err(err) if err.kind() != ErrorKind::NotFound => self
                            .listener
                            .answer(call.id, Err(Errno::from_io_error(&err).unwrap_or(Errno::MFILE))),
                        given => given,
                    };
                }
                Err(errno) => Err(errno),
            },
            Request::Remove { start, path } => self.remove(*start, path),
            Request::Rename { from, to, flags } => self.rename(from, to, *flags),
            Request::Connect { socket, address } => self.connect(*socket, address),
            Request::Bind { socket, address } => self.bind(*socket, address),
            Request::Mount { path, mount } => self.mount_point(path).and_then(|path| {
                let device = self.copy(mount.device)?;
                mount.carry_out(&path, &device)
            }),
            Request::Unmount { path, flags } => {
                self.mount_point(path).and_then(|path| crate::mount::unmount(&path, *flags))
            }
        };
        self.listener.answer(call.id, done.map(|()| 0))
    }

    fn grants(&self) -> MutexGuard<'_, Grants> {
        // Each change is one step, so that nothing is half done.
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells of what wasn't granted.
    fn told<T>(
        &mut self,
        decided: Result<T, Errno>,
        what: &str,
        name: &dyn std::fmt::Debug,
    ) -> Result<T, Errno> {
        if decided.is_err() && self.refused < TOLD {
            self.refused += 1;
            tracing::warn!(
                "refused to {what} {name:?}: the operator named nothing from which that would follow"
            );
        }
        decided
    }

    /// A copy of a descriptor of the caller's.
    fn copy(&self, number: i32) -> Result<OwnedFd, Errno> {
        pidfd_getfd(&self.caller, number, PidfdGetfdFlags::empty())
    }

    fn absolute(&self, start: Start, path: &Path) -> Result<PathBuf, Errno> {
        match start {
            _ if path.as_os_str().is_empty() => Err(Errno::NOENT),
            Start::Descriptor(number) if path.is_relative() => {
                let directory = self.copy(number)?;
                let named = rustix::fs::readlink(own(&directory), Vec::new())?;
                Ok(Path::new(std::ffi::OsStr::from_bytes(named.as_bytes())).join(path))
            }
            _ => Ok(self.grants().absolute(path)),
        }
    }

    fn open(&mut self, start: Start, path: &Path, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
        let path = self.absolute(start, path)?;
        if !FLAGS.contains(flags) {
            return Err(Errno::INVAL);
        }
        let decided = self.grants().open(&path, flags);
        let grant = self.told(decided, "open", &path)?;
        let file = self.open_granted(&grant, flags, mode)?;
        if grant.regular && !is_regular(&file)? {
            return Err(Errno::ACCESS);
        }
        if flags.contains(OFlags::CREATE | OFlags::EXCL) {
            self.grants().made(path);
        }
        if !grant.look {
            return Ok(file);
        }
        let file = File::from(file);
        let named = (self.names)(&file, &grant.path);
        self.grants().found(&grant.path, named);
        Ok(file.into())
    }

    fn open_granted(&self, grant: &Grant, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
        let makes = flags.contains(OFlags::CREATE);
        let mode = if makes { Mode::from_raw_mode(mode & 0o777) } else { Mode::empty() };
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        if let Some(number) = inherited(&grant.path) {
            // The caller's descriptor of that number, not ours; and by now it may be another than the operator meant, so that
            // what it isn't open for it doesn't become open for.
            let copy = self.copy(number)?;
            let (has, asks) = (rustix::fs::fcntl_getfl(&copy)? & OFlags::RWMODE, flags & OFlags::RWMODE);
            let more = has != asks && (has != OFlags::RDWR || asks != OFlags::RDONLY);
            if more || flags.intersects(OFlags::CREATE | OFlags::TRUNC) {
                return Err(Errno::ACCESS);
            }
            return rustix::fs::open(own(&copy), flags, mode);
        }
        let resolve = if grant.links { ResolveFlags::NO_MAGICLINKS } else { ResolveFlags::NO_SYMLINKS };
        rustix::fs::openat2(CWD, &grant.path, flags, mode, resolve)
    }

    fn remove(&mut self, start: Start, path: &Path) -> Result<(), Errno> {
        let path = self.absolute(start, path)?;
        let decided = self.grants().remove(&path);
        let path = self.told(decided, "remove", &path)?;
        rustix::fs::unlinkat(CWD, &path, AtFlags::empty())
    }

    fn rename(&mut self, from: &(Start, PathBuf), to: &(Start, PathBuf), flags: u32) -> Result<(), Errno> {
        let from = self.absolute(from.0, &from.1)?;
        let to = self.absolute(to.0, &to.1)?;
        let decided = self.grants().rename(&from, &to);
        let (from, to) = self.told(decided, "rename", &from)?;
        rustix::fs::renameat_with(CWD, &from, CWD, &to, RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?)
    }

    fn connect(&mut self, socket: i32, address: &Address) -> Result<(), Errno> {
        let socket = self.copy(socket)?;
        let decided = self.grants().connect(address);
        self.told(decided, "connect to", address)?;
        match address {
            Address::Inet(address) => rustix::net::connect(socket, address),
            Address::Path(path) => rustix::net::connect(socket, &SocketAddrUnix::new(path)?),
            Address::Abstract(name) => {
                rustix::net::connect(socket, &SocketAddrUnix::new_abstract_name(name)?)
            }
            Address::Unspecified => rustix::net::connect_unspec(socket),
        }
    }

    fn mount_point(&mut self, path: &Path) -> Result<PathBuf, Errno> {
        let path = self.absolute(Start::Here, path)?;
        let decided = self.grants().mount(&path);
        self.told(decided, "mount over", &path)?;
        Ok(path)
    }

    fn bind(&mut self, socket: i32, address: &Address) -> Result<(), Errno> {
        let socket = self.copy(socket)?;
        let decided = self.grants().bind(address);
        self.told(decided, "bind", address)?;
        match address {
            Address::Inet(address) => rustix::net::bind(socket, address),
            Address::Path(path) => rustix::net::bind(socket, &SocketAddrUnix::new(path)?),
            Address::Abstract(name) => rustix::net::bind(socket, &SocketAddrUnix::new_abstract_name(name)?),
            Address::Unspecified => Err(Errno::INVAL),
        }
    }
}

/// The name under which a descriptor of ours can be opened again.
fn own(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// The number of the descriptor that `path` names in whichever process opens it.
fn inherited(path: &Path) -> Option<i32> {
    let text = path.to_str()?;
    let number = text.strip_prefix("/dev/fd/").or_else(|| text.strip_prefix("/proc/self/fd/"))?;
    number.parse().ok()
}

fn is_regular(file: &OwnedFd) -> Result<bool, Errno> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) == FileType::RegularFile)
}
