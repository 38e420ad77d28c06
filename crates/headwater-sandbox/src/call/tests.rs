//! Arguments in the memory of this process stand for those of a caller.

use super::*;
use std::ffi::CString;
use std::fs::File;

fn memory() -> Memory {
    Memory::new(File::open("/proc/self/mem").unwrap())
}

fn decode(number: i64, args: [u64; 6]) -> Result<Request, Errno> {
    Request::decode(&Stopped { id: 1, number, args }, &memory())
}

/// A family of addresses as the machine writes it.
fn own_order(family: i32) -> [u8; 2] {
    let family = family as u16;
    if cfg!(target_endian = "big") { family.to_be_bytes() } else { family.to_le_bytes() }
}

#[test]
fn calls_are_taken_apart() {
    let path = CString::new("/images/disk").unwrap();
    let at = path.as_ptr() as u64;
    let cwd = i64::from(libc::AT_FDCWD) as u64;
    let flags = OFlags::RDWR | OFlags::CREATE;
    let open = |start| Request::Open { start, path: "/images/disk".into(), flags, mode: 0o644 };
    let bits = u64::from(flags.bits());
    assert_eq!(decode(libc::SYS_openat, [cwd, at, bits, 0o644, 0, 0]), Ok(open(Start::Here)));
    // The kernel looks at the lower half.
    assert_eq!(decode(libc::SYS_openat, [cwd & 0xffff_ffff, at, bits, 0o644, 0, 0]), Ok(open(Start::Here)));
    assert_eq!(decode(libc::SYS_openat, [7, at, bits, 0o644, 0, 0]), Ok(open(Start::Descriptor(7))));
    let gone = Request::Remove { start: Start::Here, path: "/images/disk".into() };
    assert_eq!(decode(libc::SYS_unlinkat, [cwd, at, 0, 0, 0, 0]), Ok(gone));
    assert_eq!(decode(libc::SYS_unlinkat, [cwd, at, libc::AT_REMOVEDIR as u64, 0, 0, 0]), Err(Errno::NOSYS));
    assert_eq!(decode(libc::SYS_execve, [at; 6]), Err(Errno::NOSYS));
    for call in [libc::SYS_openat, libc::SYS_unlinkat, libc::SYS_renameat2] {
        assert_eq!(decode(call, [cwd, 8, 0, 0, 0, 0]), Err(Errno::FAULT));
    }
    for call in [libc::SYS_connect, libc::SYS_bind] {
        assert_eq!(decode(call, [3, 8, 16, 0, 0, 0]), Err(Errno::FAULT));
    }
}

#[test]
fn addresses_are_taken_apart() {
    let unix = |name: &[u8]| [&own_order(libc::AF_UNIX)[..], name].concat();
    assert_eq!(parse(&unix(b"/run/sock\0rest")), Ok(Address::Path("/run/sock".into())));
    assert_eq!(parse(&unix(b"/run/sock")), Ok(Address::Path("/run/sock".into())));
    assert_eq!(parse(&unix(b"\0name\0")), Ok(Address::Abstract(b"name\0".to_vec())));
    assert_eq!(parse(&unix(b"")), Err(Errno::INVAL));
    let v4 = [&own_order(libc::AF_INET)[..], &[0x2a, 0x39, 127, 0, 0, 1], &[0; 8]].concat();
    assert_eq!(parse(&v4), Ok(Address::Inet("127.0.0.1:10809".parse().unwrap())));
    let v6 = [&own_order(libc::AF_INET6)[..], &[0, 80], &[0; 4], &[0; 15], &[1], &[0; 4]].concat();
    assert_eq!(parse(&v6), Ok(Address::Inet("[::1]:80".parse().unwrap())));
    assert_eq!(parse(&[0; 16]), Ok(Address::Unspecified));
    assert_eq!(parse(&own_order(libc::AF_NETLINK)), Err(Errno::AFNOSUPPORT));
}

#[test]
fn short_addresses_are_refused() {
    for family in [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6] {
        let bytes = own_order(family);
        for len in 0..3 {
            let bytes = [&bytes[..], &[1]].concat();
            let parsed = parse(&bytes[..len]);
            assert!(parsed.is_err(), "{family} {len} {parsed:?}");
        }
    }
    let bytes = [0_u8; 200];
    let at = bytes.as_ptr() as u64;
    assert_eq!(address(&memory(), at, 200), Err(Errno::INVAL));
    assert_eq!(address(&memory(), at, u64::MAX), Err(Errno::INVAL));
}
