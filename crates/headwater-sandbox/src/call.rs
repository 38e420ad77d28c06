//! What a stopped call asks for, taken out of its arguments and its caller's memory.

use crate::memory::Memory;
use crate::mount::Mount;
use crate::sys::Stopped;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::path::PathBuf;

/// Where a relative path starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// The working directory, which both processes share.
    Here,
    /// A directory that the caller has this descriptor of.
    Descriptor(i32),
}

/// What a socket is bound or connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    Inet(SocketAddr),
    Path(PathBuf),
    /// A Unix socket without a file: its name without the zero in front.
    Abstract(Vec<u8>),
    /// None: a datagram socket forgets its peer.
    Unspecified,
}

/// A call that names something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    Open { start: Start, path: PathBuf, flags: OFlags, mode: u32 },
    Remove { start: Start, path: PathBuf },
    Rename { from: (Start, PathBuf), to: (Start, PathBuf), flags: u32 },
    Connect { socket: i32, address: Address },
    Bind { socket: i32, address: Address },
    Mount { path: PathBuf, mount: Mount },
    Unmount { path: PathBuf, flags: u64 },
}

/// Longest address, in bytes.
const LONGEST_ADDRESS: u64 = 128;

impl Request {
    /// Errors: what the kernel would say of such arguments, and `NOSYS` for what isn't supported.
    pub(crate) fn decode(call: &Stopped, memory: &Memory) -> Result<Self, Errno> {
        let args = call.args;
        let named = |start: u64, path: u64| Ok((start_of(start), memory.path(path)?));
        let open = |(start, path), flags: u64, mode: u64| {
            let flags = OFlags::from_bits_retain(flags as u32);
            Request::Open { start, path, flags, mode: mode as u32 }
        };
        #[cfg(target_arch = "x86_64")]
        let here = |path: u64| Ok((Start::Here, memory.path(path)?));
        match call.number {
            libc::SYS_openat => Ok(open(named(args[0], args[1])?, args[2], args[3])),
            // Directories are never removed.
            libc::SYS_unlinkat if args[2] != 0 => Err(Errno::NOSYS),
            libc::SYS_unlinkat => named(args[0], args[1]).map(|(start, path)| Self::Remove { start, path }),
            libc::SYS_renameat2 => Ok(Self::Rename {
                from: named(args[0], args[1])?,
                to: named(args[2], args[3])?,
                flags: args[4] as u32,
            }),
            libc::SYS_connect => {
                Ok(Self::Connect { socket: args[0] as i32, address: address(memory, args[1], args[2])? })
            }
            libc::SYS_bind => {
                Ok(Self::Bind { socket: args[0] as i32, address: address(memory, args[1], args[2])? })
            }
            libc::SYS_mount => Ok(Self::Mount {
                path: memory.path(args[1])?,
                mount: Mount::new(&memory.path(args[2])?, args[3], &memory.path(args[4])?)?,
            }),
            libc::SYS_umount2 => Ok(Self::Unmount { path: memory.path(args[0])?, flags: args[1] }),
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            libc::SYS_renameat => {
                Ok(Self::Rename { from: named(args[0], args[1])?, to: named(args[2], args[3])?, flags: 0 })
            }
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open => Ok(open(here(args[0])?, args[1], args[2])),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_unlink => here(args[0]).map(|(start, path)| Self::Remove { start, path }),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_rename => Ok(Self::Rename { from: here(args[0])?, to: here(args[1])?, flags: 0 }),
            _ => Err(Errno::NOSYS),
        }
    }
}

fn start_of(descriptor: u64) -> Start {
    match descriptor as i32 {
        libc::AT_FDCWD => Start::Here,
        number => Start::Descriptor(number),
    }
}

fn address(memory: &Memory, at: u64, len: u64) -> Result<Address, Errno> {
    // The kernel looks at the lower half only.
    let len = u64::from(len as u32);
    if len > LONGEST_ADDRESS {
        return Err(Errno::INVAL);
    }
    parse(&memory.bytes(at, len as usize)?)
}

/// The address that these bytes are.
fn parse(bytes: &[u8]) -> Result<Address, Errno> {
    let array = |at: usize| -> Result<[u8; 4], Errno> {
        bytes.get(at..at + 4).and_then(|part| part.try_into().ok()).ok_or(Errno::INVAL)
    };
    let (family, rest) = bytes.split_first_chunk::<2>().ok_or(Errno::INVAL)?;
    // The family is in the machine's own order, what comes after it in the network's.
    let family =
        if cfg!(target_endian = "big") { u16::from_be_bytes(*family) } else { u16::from_le_bytes(*family) };
    let port = || rest.first_chunk().map(|port| u16::from_be_bytes(*port)).ok_or(Errno::INVAL);
    match i32::from(family) {
        libc::AF_UNSPEC => Ok(Address::Unspecified),
        libc::AF_INET => {
            let ip = Ipv4Addr::from(array(4)?);
            Ok(Address::Inet(SocketAddrV4::new(ip, port()?).into()))
        }
        libc::AF_INET6 => {
            let ip: [u8; 16] = bytes.get(8..24).and_then(|ip| ip.try_into().ok()).ok_or(Errno::INVAL)?;
            let native = |bytes| {
                if cfg!(target_endian = "big") {
                    u32::from_be_bytes(bytes)
                } else {
                    u32::from_le_bytes(bytes)
                }
            };
            let scope = array(24).map_or(0, native);
            let address = SocketAddrV6::new(Ipv6Addr::from(ip), port()?, 0, scope);
            Ok(Address::Inet(address.into()))
        }
        libc::AF_UNIX => match rest.split_first() {
            // The kernel would choose a name.
            None => Err(Errno::INVAL),
            Some((0, name)) => Ok(Address::Abstract(name.to_vec())),
            Some(_) => {
                use std::os::unix::ffi::OsStringExt;
                let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
                Ok(Address::Path(std::ffi::OsString::from_vec(rest[..end].to_vec()).into()))
            }
        },
        _ => Err(Errno::AFNOSUPPORT),
    }
}

#[cfg(test)]
mod tests;
