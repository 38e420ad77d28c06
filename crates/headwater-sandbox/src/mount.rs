//! Mounting for the data plane: a disk as a file, by FUSE, over a file that the operator named.
//!
//! What is mounted is served by the data plane, so that whoever takes it over decides what the file holds; that much the operator asked for.
//! Nothing else may be had by it: no other kind of file system, no devices, no programs.

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What is mounted.
const KIND: &str = "fuse.headwater";

/// Flags that must be given, and those that may be.
const MUST: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const MAY: MountFlags = MUST.union(MountFlags::NOATIME).union(MountFlags::RDONLY);

/// What a call of mount asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    flags: MountFlags,
    /// The caller's descriptor of /dev/fuse.
    pub(crate) device: i32,
    /// The options after it.
    options: String,
}

impl Mount {
    /// Errors: `PERM` for anything but what a FUSE export needs.
    pub(crate) fn new(kind: &Path, flags: u64, data: &Path) -> Result<Self, Errno> {
        let flags = u32::try_from(flags).ok().map(MountFlags::from_bits_retain).ok_or(Errno::PERM)?;
        let data = data.to_str().and_then(|data| data.strip_prefix("fd=")).ok_or(Errno::PERM)?;
        let (device, options) = data.split_once(',').ok_or(Errno::PERM)?;
        let known = |option: &str| match option.split_once('=') {
            Some(("rootmode", mode)) => mode == "100000",
            Some(("user_id" | "group_id", id)) => id.bytes().all(|byte| byte.is_ascii_digit()),
            None => matches!(option, "allow_other" | "default_permissions"),
            Some(_) => false,
        };
        let fits = kind == Path::new(KIND) && flags.contains(MUST) && MAY.contains(flags);
        if !fits || !options.split(',').all(known) {
            return Err(Errno::PERM);
        }
        let device = device.parse().map_err(|_| Errno::PERM)?;
        Ok(Self { flags, device, options: options.to_owned() })
    }

    /// Mounts over `path`; `device` is a copy of the caller's descriptor.
    pub(crate) fn carry_out(&self, path: &Path, device: &OwnedFd) -> Result<(), Errno> {
        let data = format!("fd={},{}", device.as_raw_fd(), self.options);
        let data = CString::new(data).map_err(|_| Errno::INVAL)?;
        rustix::mount::mount("headwater", path, KIND, self.flags, data.as_c_str())
    }
}

/// Takes away what is mounted at `path`.
pub(crate) fn unmount(path: &Path, flags: u64) -> Result<(), Errno> {
    let known = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    let flags = u32::try_from(flags).ok().map(UnmountFlags::from_bits_retain);
    let flags = flags.filter(|flags| known.contains(*flags)).ok_or(Errno::INVAL)?;
    rustix::mount::unmount(path.as_os_str().as_bytes(), flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_export_needs_is_mounted() {
        let flags = u64::from(MUST.bits());
        let mount = |kind: &str, flags, data: &str| Mount::new(Path::new(kind), flags, Path::new(data));
        let asked = mount(KIND, flags, "fd=7,rootmode=100000,user_id=0,group_id=0,allow_other").unwrap();
        assert_eq!(
            (asked.device, &asked.options[..]),
            (7, "rootmode=100000,user_id=0,group_id=0,allow_other")
        );
        assert!(mount(KIND, flags | u64::from(MountFlags::RDONLY.bits()), "fd=7,rootmode=100000").is_ok());
        for (kind, flags, data) in [
            ("ext4", flags, "fd=7,rootmode=100000"),
            ("fuse", flags, "fd=7,rootmode=100000"),
            (KIND, 0, "fd=7,rootmode=100000"),
            (KIND, flags | u64::from(MountFlags::BIND.bits()), "fd=7,rootmode=100000"),
            (KIND, flags | 1 << 40, "fd=7,rootmode=100000"),
            (KIND, flags, "fd=7"),
            (KIND, flags, "fd=x,rootmode=100000"),
            (KIND, flags, "rootmode=100000,fd=7"),
            (KIND, flags, "fd=7,rootmode=40000"),
            (KIND, flags, "fd=7,rootmode=100000,fd=8"),
            (KIND, flags, "fd=7,rootmode=100000,context=x"),
        ] {
            assert_eq!(mount(kind, flags, data), Err(Errno::PERM), "{kind} {flags:#x} {data}");
        }
    }
}
