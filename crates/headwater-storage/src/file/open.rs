//! Opening a file or block device: what it is, whether O_DIRECT works there, and what that asks of requests.

use super::lock;
use super::op::OpenFile;
use headwater_block::{BufferMut, Error, ErrorKind, Result};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// What buffers are aligned to; a device that wants more of memory can't be used with O_DIRECT here.
const BUFFER_ALIGNMENT: u32 = headwater_block::buffer::ALIGNMENT as u32;

/// Whether the kernel's page cache is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cache {
    /// Around it where the file system can, else through it.
    #[default]
    Auto,
    /// Around it (O_DIRECT), or an error.
    Direct,
    /// Through it.
    Buffered,
}

/// Whether image locks are taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Locking {
    /// Where the file system has locks.
    #[default]
    Auto,
    /// Always; it is an error if the file system has none.
    On,
    /// Never.
    Off,
}

/// What becomes of discards, and of zeroes that may give storage back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Discard {
    /// Storage is given back.
    #[default]
    Unmap,
    /// Nothing: what is discarded stays as it is, and zeroes stay allocated.
    Ignore,
}

/// What a name must lead to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Demand {
    /// A regular file or a block device.
    #[default]
    Any,
    /// A regular file.
    Regular,
    /// A block device.
    Device,
}

/// How a file is to be opened. The default: read and write, O_DIRECT where possible, locked where possible.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Changes are refused, and the file need not be writable.
    pub read_only: bool,
    /// Page cache or not.
    pub cache: Cache,
    /// Image locks.
    pub locking: Locking,
    /// A reader tolerates that others write the image, and may get a mixture of old and new; for looking at images in use.
    /// No meaning for a writer.
    pub force_share: bool,
    /// Opens for reading only what can't be opened for writing (the system refuses it, or the file system is read-only). Whether it came to
    /// that, [`headwater_block::Node::is_read_only`] tells.
    pub auto_read_only: bool,
    /// What the name must lead to.
    pub demand: Demand,
    /// What becomes of discards.
    pub discard: Discard,
    /// Flushes succeed at once and do nothing, and so does the durability of single writes: for data that nobody will miss.
    pub no_flush: bool,
}

/// What kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    BlockDevice,
}

/// An open file with what was found out about it.
pub(super) struct Opened {
    pub(super) file: OpenFile,
    pub(super) kind: Kind,
    /// It was opened for reading only.
    pub(super) read_only: bool,
    /// Image locks are held.
    pub(super) locked: bool,
    /// In bytes.
    pub(super) size: u64,
    /// In bytes: what the file system likes requests to be multiples of.
    pub(super) block: u32,
}

/// What O_DIRECT asks for, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Alignment {
    memory: u32,
    offset: u32,
}

/// Opens what is there.
pub(super) fn existing(path: &Path, name: &str, options: &FileOptions) -> Result<Opened> {
    // Some devices act when they are opened, and a FIFO blocks, so look first.
    let stat =
        rustix::fs::stat(path).map_err(|err| Error::from_io(err.into(), format_args!("open {name}")))?;
    kind_of(stat.st_mode, name, options.demand)?;
    let open = |access| {
        // NONBLOCK in case it became a FIFO in between; cleared below.
        let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::open(path, flags, Mode::empty())
    };
    let mut options = *options;
    let mut opened = open(if options.read_only { OFlags::RDONLY } else { OFlags::RDWR });
    let refused =
        matches!(&opened, Err(rustix::io::Errno::ACCESS | rustix::io::Errno::ROFS | rustix::io::Errno::PERM));
    if refused && options.auto_read_only && !options.read_only {
        options.read_only = true;
        opened = open(OFlags::RDONLY);
    }
    let fd = opened.map_err(|err| {
        let what = if options.read_only { "reading" } else { "writing" };
        Error::from_io(err.into(), format_args!("open {name} for {what}"))
    })?;
    examine(fd, name, &options)
}

/// Makes a file that must not exist, empty, with mode 0644 (less the umask), durably.
pub(super) fn new(path: &Path, name: &str, options: &FileOptions) -> Result<Opened> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))
        .map_err(|err| Error::from_io(err.into(), format_args!("create {name}")))?;
    examine(fd, name, options).and_then(|opened| sync_directory(path, name).map(|()| opened)).inspect_err(
        |_| {
            // Ours, and empty; the first error is the one to tell.
            let _ = rustix::fs::unlink(path);
        },
    )
}

/// A flush of the file makes its bytes durable, not its name.
fn sync_directory(path: &Path, name: &str) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let sync = || {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::fsync(rustix::fs::open(parent, flags, Mode::empty())?)
    };
    match sync() {
        // A file system without durable directories, or a directory that may be written but not read: nothing more can be done.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::ACCESS) => Ok(()),
        Err(err) => Err(Error::from_io(err.into(), format_args!("make the name of {name} durable"))),
    }
}

fn kind_of(mode: u32, name: &str, demand: Demand) -> Result<Kind> {
    let what = match FileType::from_raw_mode(mode) {
        FileType::RegularFile if demand != Demand::Device => return Ok(Kind::Regular),
        FileType::BlockDevice if demand != Demand::Regular => return Ok(Kind::BlockDevice),
        FileType::RegularFile => "a regular file",
        FileType::BlockDevice => "a block device",
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        _ => "no regular file",
    };
    let message = match demand {
        Demand::Any => format!("{name} is {what}; a disk needs a regular file or a block device"),
        Demand::Regular => {
            format!("{name} is {what}; here it must be a regular file (devices are opened as host_device)")
        }
        Demand::Device => {
            format!("{name} is {what}; here it must be a block device (files are opened as file)")
        }
    };
    Err(Error::new(ErrorKind::InvalidInput, message))
}

fn examine(fd: OwnedFd, name: &str, options: &FileOptions) -> Result<Opened> {
    let failed = |err: rustix::io::Errno| Error::from_io(err.into(), format_args!("examine {name}"));
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    let kind = kind_of(stat.st_mode, name, options.demand)?;
    // Before the size is asked for, which a writer could still change.
    let locked = take_locks(&fd, name, options)?;
    // Nobody uses the file position; the end is where a device, too, says its size.
    let size = rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0)).map_err(failed)?;
    let alignment = match options.cache {
        Cache::Buffered => None,
        Cache::Auto => enter_direct(&fd, size).ok(),
        Cache::Direct => Some(enter_direct(&fd, size).map_err(|err| {
            let message = format!("{name}: no direct I/O there ({err}); use the page cache for it");
            Error::new(ErrorKind::Unsupported, message)
        })?),
    };
    if alignment.is_none() {
        rustix::fs::fcntl_setfl(&fd, OFlags::empty()).map_err(failed)?;
    }
    let Alignment { memory, offset } = alignment.unwrap_or(Alignment { memory: 1, offset: 1 });
    let block = u32::try_from(stat.st_blksize).unwrap_or(0).clamp(4096, 1 << 16).next_power_of_two();
    let file = OpenFile::new(fd, offset, memory);
    Ok(Opened { file, kind, read_only: options.read_only, locked, size, block })
}

/// What image locks are for, with these options.
pub(super) fn usage(options: &FileOptions) -> lock::Use {
    match options {
        FileOptions { read_only: false, .. } => lock::Use::Write,
        FileOptions { force_share: true, .. } => lock::Use::ReadShared,
        _ => lock::Use::Read,
    }
}

/// Takes the image locks that the options ask for. True if they are held.
fn take_locks(fd: &OwnedFd, name: &str, options: &FileOptions) -> Result<bool> {
    if options.locking == Locking::Off {
        return Ok(false);
    }
    let usage = usage(options);
    let locked = lock::acquire(fd.as_fd(), name, usage)?;
    if !locked && options.locking == Locking::On {
        let message = format!(
            "{name}: its file system has no locks; switch locking off if nothing else uses the image"
        );
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    if !locked {
        tracing::debug!(name, "the file system has no locks: nothing keeps a second writer away");
    }
    Ok(locked)
}

/// Why there is no direct I/O.
enum NoDirect {
    Refused(io::Error),
    Alignment(Alignment),
}

impl fmt::Display for NoDirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoDirect::Refused(err) => write!(f, "{err}"),
            NoDirect::Alignment(a) => {
                write!(
                    f,
                    "it would need memory aligned to {} and offsets aligned to {} bytes",
                    a.memory, a.offset
                )
            }
        }
    }
}

/// Switches the descriptor to O_DIRECT and finds out what that asks for.
fn enter_direct(fd: &OwnedFd, size: u64) -> Result<Alignment, NoDirect> {
    let refused = |err: rustix::io::Errno| NoDirect::Refused(err.into());
    rustix::fs::fcntl_setfl(fd, OFlags::DIRECT).map_err(refused)?;
    let alignment = match told_alignment(fd) {
        Some(Alignment { offset: 0, .. }) => return Err(refused(rustix::io::Errno::INVAL)),
        Some(told) => told,
        None => probe_alignment(fd, size).map_err(refused)?,
    };
    let usable = alignment.memory.is_power_of_two()
        && alignment.offset.is_power_of_two()
        && alignment.memory <= BUFFER_ALIGNMENT
        && alignment.offset <= 1 << 16;
    if usable { Ok(alignment) } else { Err(NoDirect::Alignment(alignment)) }
}

/// What the kernel says (Linux 6.1 and later, on file systems that take part). An offset of 0 means: not for this file.
fn told_alignment(fd: &OwnedFd) -> Option<Alignment> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    told.then_some(Alignment { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align })
}

/// What a read shows. One at the end of a file may succeed whatever its alignment, so that a short file is taken to need the usual.
fn probe_alignment(fd: &OwnedFd, size: u64) -> rustix::io::Result<Alignment> {
    let mut buf = BufferMut::new(BUFFER_ALIGNMENT as usize);
    let candidates: &[u32] = if size >= 2 * u64::from(BUFFER_ALIGNMENT) { &[512, 1024, 2048] } else { &[] };
    for candidate in candidates {
        // At an odd multiple, so that nothing larger would do.
        if rustix::io::pread(fd, &mut buf[..*candidate as usize], u64::from(*candidate)).is_ok() {
            return Ok(Alignment { memory: *candidate, offset: *candidate });
        }
    }
    rustix::io::pread(fd, &mut buf[..], 0)?;
    Ok(Alignment { memory: BUFFER_ALIGNMENT, offset: BUFFER_ALIGNMENT })
}

/// Leaves O_DIRECT: from now on any alignment will do.
pub(super) fn leave_direct(file: &OpenFile, name: &str) -> Result<()> {
    rustix::fs::fcntl_setfl(file.fd.as_fd(), OFlags::empty())
        .map_err(|err| Error::from_io(err.into(), format_args!("leave direct I/O for {name}")))?;
    file.alignment.set(1);
    file.memory_alignment.set(1);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::CWD;

    #[test]
    fn what_is_told_and_what_is_probed_agree() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let fd = OwnedFd::from(file.reopen().unwrap());
        if rustix::fs::fcntl_setfl(&fd, OFlags::DIRECT).is_err() {
            return;
        }
        let probed = probe_alignment(&fd, 1 << 20).unwrap();
        if let Some(told) = told_alignment(&fd) {
            assert!(probed.offset >= told.offset && probed.memory >= told.memory, "{probed:?} {told:?}");
        }
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        for (path, what) in
            [(dir.path(), "a directory"), (&fifo, "a FIFO"), (Path::new("/dev/null"), "a character device")]
        {
            let err = existing(path, "disk", &FileOptions::default()).err().unwrap();
            assert_eq!(err.kind(), ErrorKind::InvalidInput);
            assert!(err.to_string().contains(what), "{err}");
        }
        let missing = existing(&dir.path().join("no"), "no", &FileOptions::default()).err().unwrap();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_demand_for_another_kind_is_not_met() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = |demand| existing(file.path(), "disk", &FileOptions { demand, ..FileOptions::default() });
        assert!(open(Demand::Any).is_ok() && open(Demand::Regular).is_ok());
        let err = open(Demand::Device).err().unwrap();
        assert_eq!(err.kind(), ErrorKind::InvalidInput);
        assert!(err.to_string().contains("must be a block device"), "{err}");
        let device = FileType::BlockDevice.as_raw_mode();
        let err = kind_of(device, "disk", Demand::Regular).unwrap_err();
        assert!(err.to_string().contains("must be a regular file"), "{err}");
        assert_eq!(kind_of(device, "disk", Demand::Device).unwrap(), Kind::BlockDevice);
    }

    #[test]
    fn what_cannot_be_written_is_read_if_that_is_good_enough() {
        let file = tempfile::NamedTempFile::new().unwrap();
        rustix::fs::chmod(file.path(), Mode::from_raw_mode(0o444)).unwrap();
        // To root all files are writable, but for what the kernel lets nobody write.
        let for_root = Path::new("/sys/kernel/uevent_seqnum");
        let is_root = std::fs::File::options().write(true).open(file.path()).is_ok();
        let path = if is_root { for_root } else { file.path() };
        if !path.exists() {
            return;
        }
        let open = |options: FileOptions| existing(path, "disk", &options);
        let err = open(FileOptions::default()).err().unwrap();
        assert!(matches!(err.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly), "{err}");
        let opened = open(FileOptions { auto_read_only: true, ..FileOptions::default() }).ok().unwrap();
        assert!(opened.read_only);
        let writable = tempfile::NamedTempFile::new().unwrap();
        let auto = FileOptions { auto_read_only: true, ..FileOptions::default() };
        assert!(!existing(writable.path(), "disk", &auto).ok().unwrap().read_only);
    }
}
