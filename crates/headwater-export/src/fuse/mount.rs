//! Putting the file system in place over a regular file, and taking it away.
//!
//! With the privilege to mount (CAP_SYS_ADMIN) this is a system call; others go through `fusermount3`, which hands the descriptor back over a
//! socket.

use crate::blocking::blocking;
use crate::removal::Removal;
use headwater_block::{Error, ErrorKind, LocalFuture, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use std::ffi::CString;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

/// The program that mounts for those who may not.
const FUSERMOUNT: &str = "fusermount3";

/// How the file is to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// It can be opened for writing.
    pub writable: bool,
    /// Other users than the one who mounts it are let in, as far as the file's mode allows. Without privileges this needs `user_allow_other`
    /// in /etc/fuse.conf.
    pub allow_other: bool,
}

/// A file system that is in place and waits for its server.
pub struct Mounted {
    /// Where.
    pub path: PathBuf,
    /// The kernel's end: requests are read from it.
    pub device: OwnedFd,
    /// When the file below was changed last: the time that the disk shows.
    pub since: SystemTime,
    /// Takes it away again; see [`unmount`].
    pub unmount: Box<dyn Fn(Removal) -> LocalFuture<'static, Result<()>>>,
}

/// Mounts over the regular file at `path`, on a thread that may block. Where a server that crashed has left its dead mount it is taken
/// away first.
///
/// # Errors
/// If there is no regular file, no FUSE in the kernel, or the right to mount is missing.
pub async fn mount(path: &Path, options: MountOptions) -> Result<Mounted> {
    let at = path.to_owned();
    let (device, since) = blocking(move || mount_now(&at, options)).await?;
    let at = path.to_owned();
    let unmount = move |how| -> LocalFuture<'static, Result<()>> {
        let at = at.clone();
        Box::pin(blocking(move || unmount(&at, how)))
    };
    Ok(Mounted { path: path.to_owned(), device, since, unmount: Box::new(unmount) })
}

fn mount_now(path: &Path, options: MountOptions) -> Result<(OwnedFd, SystemTime)> {
    let shown = path.display();
    let mut found = std::fs::metadata(path);
    // What a server that was killed leaves behind.
    if found.as_ref().is_err_and(|err| err.raw_os_error() == Some(Errno::NOTCONN.raw_os_error())) {
        unmount(path, Removal::Hard)?;
        found = std::fs::metadata(path);
    }
    let found = found.map_err(|err| {
        Error::from_io(err, format!("mount a disk over {shown}, where a regular file must be"))
    })?;
    if !found.is_file() {
        let what = match found.file_type() {
            kind if kind.is_dir() => "a directory",
            kind if kind.is_block_device() => "a block device",
            _ => "no regular file",
        };
        let message = format!("{shown} is {what}; a disk is mounted over a regular file");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let since = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| failed(path, "open /dev/fuse (is the module fuse loaded?) for", errno))?;
    let mut data = format!(
        "fd={},rootmode=100000,user_id={},group_id={}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw()
    );
    if options.allow_other {
        data.push_str(",allow_other,default_permissions");
    }
    let data = CString::new(data).unwrap_or_default();
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    flags.set(MountFlags::RDONLY, !options.writable);
    match rustix::mount::mount("headwater", path, "fuse.headwater", flags, data.as_c_str()) {
        Ok(()) => Ok((device, since)),
        Err(Errno::PERM) => Ok((mount_through_helper(path, options)?, since)),
        Err(errno) => Err(failed(path, "mount a disk over", errno)),
    }
}

/// Lets `fusermount3` mount.
fn mount_through_helper(path: &Path, options: MountOptions) -> Result<OwnedFd> {
    let cannot = |errno| failed(path, "talk to fusermount3 for", errno);
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)
            .map_err(cannot)?;
    rustix::io::fcntl_setfd(&ours, FdFlags::CLOEXEC).map_err(cannot)?;
    let mut words = String::from("nosuid,nodev,noexec,noatime,fsname=headwater,subtype=headwater");
    if !options.writable {
        words.push_str(",ro");
    }
    if options.allow_other {
        words.push_str(",allow_other,default_permissions");
    }
    let run = Command::new(FUSERMOUNT)
        .args(["-o", &words, "--"])
        .arg(path)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|err| {
            let what = format!(
                "mount a disk over {}: it takes root, CAP_SYS_ADMIN or the program {FUSERMOUNT} (package fuse3)",
                path.display()
            );
            Error::from_io(err, &what)
        })?;
    drop(theirs);
    if !run.status.success() {
        let said = String::from_utf8_lossy(&run.stderr).trim().to_owned();
        let message = format!("{}: {FUSERMOUNT}: {said}", path.display());
        return Err(Error::new(ErrorKind::PermissionDenied, message));
    }
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::net::recvmsg(&ours, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .map_err(cannot)?;
    let device = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    device.ok_or_else(|| {
        let message = format!("{}: {FUSERMOUNT} handed no descriptor over", path.display());
        Error::new(ErrorKind::Io, message)
    })
}

/// Takes the file system at `path` away. Blocks until the kernel has done so.
///
/// # Errors
/// `InUse` with [`Removal::Safe`] if somebody has the file open; and those of the system.
pub fn unmount(path: &Path, how: Removal) -> Result<()> {
    let lazily = || rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    let result = match how {
        Removal::Safe => rustix::mount::unmount(path, UnmountFlags::NOFOLLOW),
        // Those who have it open get errors; then it goes, at the latest when they close it.
        Removal::Hard => match rustix::mount::unmount(path, UnmountFlags::FORCE | UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => lazily(),
            result => result,
        },
    };
    match result {
        Ok(()) => Ok(()),
        // It is gone already.
        Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => {
            Err(Error::new(ErrorKind::InUse, format!("{}: somebody has it open", path.display())))
        }
        Err(Errno::PERM) => unmount_through_helper(path, how),
        Err(errno) => Err(failed(path, "unmount", errno)),
    }
}

fn unmount_through_helper(path: &Path, how: Removal) -> Result<()> {
    let mut command = Command::new(FUSERMOUNT);
    command.arg("-u").args((how == Removal::Hard).then_some("-z")).arg("--").arg(path).stdin(Stdio::null());
    let run = command
        .output()
        .map_err(|err| Error::from_io(err, format!("run {FUSERMOUNT} for {}", path.display())))?;
    if run.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&run.stderr).trim().to_owned();
    let kind =
        if said.to_lowercase().contains("busy") { ErrorKind::InUse } else { ErrorKind::PermissionDenied };
    Err(Error::new(kind, format!("{}: {FUSERMOUNT}: {said}", path.display())))
}

fn failed(path: &Path, what: &str, errno: Errno) -> Error {
    Error::from_io(errno.into(), format!("{what} {}", path.display()))
}
