//! The server with the NBD clients that people use: nbdinfo, nbdsh, nbdcopy, qemu-img, qemu-io and fio.

use std::path::Path;
use std::process::Command;

use crate::common::{SIZE, Server};
use headwater_export::Listen;
use headwater_export::nbd::ServerOptions;
use headwater_nbd::NbdAddress;

/// Runs a tool that must succeed; returns what it printed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    // nbdsh needs the system's own Python, whichever else comes first in the path.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; scripts/setup installs it"));
    let printed =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{printed}", output.status);
    printed
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A raw image of the exports' size with data, zeroes and holes in pieces of odd sizes.
pub(crate) fn sample(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    let mut state = 1_u32;
    let mut at = 0;
    while at < bytes.len() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let length = ((state >> 8) as usize % 700_000).min(bytes.len() - at);
        if state >> 30 != 0 {
            for (i, byte) in bytes[at..at + length].iter_mut().enumerate() {
                *byte = (i as u32 ^ state) as u8;
            }
        }
        at += length + 1;
    }
    std::fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn nbdinfo_sees_all_exports_and_what_they_can_do() {
    let server = Server::start();
    let list = run("nbdinfo", &["--list", &server.uri("")]);
    assert!(list.contains("export=\"disk\"") && list.contains("export=\"read-only\""), "{list}");
    assert!(list.contains("description: the export disk"), "{list}");
    let disk = run("nbdinfo", &[&server.uri("disk")]);
    for line in [
        "protocol: newstyle-fixed without TLS, using structured packets",
        &format!("export-size: {SIZE}"),
        "is_read_only: false",
        "can_cache: true",
        "can_df: true",
        "can_fast_zero: true",
        "can_flush: true",
        "can_fua: true",
        "can_multi_conn: true",
        "can_trim: true",
        "can_zero: true",
        "block_size_minimum: 1",
        "block_size_maximum: 33554432",
        "base:allocation",
        "qemu:allocation-depth",
    ] {
        assert!(disk.contains(line), "{line} in\n{disk}");
    }
    let read_only = run("nbdinfo", &[&server.uri("read-only")]);
    assert!(read_only.contains("is_read_only: true") && read_only.contains("can_trim: false"), "{read_only}");
    let unknown = Command::new("nbdinfo").arg(server.uri("nothing")).output().unwrap();
    assert!(!unknown.status.success());
    let words = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(words.contains("for export: nothing"), "{words}");
}

#[test]
fn copies_there_and_back_are_equal_and_sparse() {
    let server = Server::start();
    let (image, back) = (server.path("image.raw"), server.path("back.raw"));
    let bytes = sample(&image);
    let uri = server.uri("disk");
    run("nbdcopy", &[text(&image), &uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &uri]);
    run("nbdcopy", &["--connections=4", "--requests=64", &uri, text(&back)]);
    assert!(std::fs::read(&back).unwrap() == bytes, "nbdcopy reads what it wrote");
    let map = run("nbdinfo", &["--map", "--totals", &uri]);
    assert!(map.contains("data") && map.contains("hole,zero"), "{map}");
    run("nbdinfo", &["--map=qemu:allocation-depth", &uri]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-W", "-m", "16", &uri, text(&back)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&image), text(&back)]);
}

#[test]
fn tcp_works_too() {
    let directory = tempfile::tempdir().unwrap();
    for host in ["127.0.0.1", "::1"] {
        let address = NbdAddress::Tcp { host: host.to_owned(), port: 0 };
        let listen = Listen::from(&address);
        if host == "::1" && std::net::TcpListener::bind((host, 0)).is_err() {
            eprintln!("no IPv6 here");
            continue;
        }
        let server =
            Server::start_at(tempfile::tempdir_in(&directory).unwrap(), listen, ServerOptions::default());
        let image = server.path("image.raw");
        sample(&image);
        run("nbdcopy", &[text(&image), &server.uri("disk")]);
        run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &server.uri("disk")]);
    }
}

#[test]
fn qemu_io_reads_back_its_patterns() {
    let server = Server::start();
    let uri = server.uri("disk");
    let commands = [
        "write -P 0x11 0 1M",
        "write -P 0x22 -f 1000 5000",
        "aio_write -P 0x33 3M 2M",
        "aio_flush",
        "write -z 4M 512k",
        "write -z -u 64k 64k",
        "discard 192k 64k",
        "flush",
        "read -P 0x11 0 1000",
        "read -P 0x22 1000 5000",
        "read -P 0x11 6000 1000",
        "read -P 0 64k 64k",
        "read -P 0 192k 64k",
        "read -P 0x33 3M 1M",
        "read -P 0 4M 512k",
        "read -P 0x33 4718592 524288",
        "map",
    ];
    let arguments: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    let printed = run("qemu-io", &[&["-f", "raw", &uri], &arguments[..]].concat());
    assert!(!printed.contains("verification failed") && !printed.contains("failed:"), "{printed}");
    let printed = run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 1M", &server.uri("read-only")]);
    assert!(!printed.contains("failed"), "{printed}");
}

/// Requests that only a library lets one send.
const SHELL: &str = r#"
import errno
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:allocation-depth")
h.connect_uri(URI)

def fails(expected, f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except nbd.Error as error:
        assert error.errnum == expected, (error.errnum, expected, args, kwargs)
    else:
        raise AssertionError(("did not fail", args, kwargs))

size = h.get_size()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
data = bytes(range(256)) * 1024
h.pwrite(data, 4096 * 3 + 1, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 4096 * 3 + 1, nbd.CMD_FLAG_DF) == data
assert h.pread(1, 4096 * 3) == b"\0"

chunks = []
def chunk(buf, offset, status, error):
    chunks.append((bytes(buf), offset, status))
assert h.pread_structured(1 << 20, 8 << 20, chunk) == bytes(1 << 20)
assert [(c[1], c[2]) for c in chunks] == [(8 << 20, nbd.READ_HOLE)], chunks

entries = {}
def extent(context, offset, found, error):
    entries[context] = found
h.block_status(1 << 20, 0, extent)
assert entries["base:allocation"][:4] == [12288, 3, 266240, 0], entries
assert entries["qemu:allocation-depth"][:4] == [12288, 0, 266240, 1], entries
h.block_status(1 << 20, 0, extent, nbd.CMD_FLAG_REQ_ONE)
assert entries["base:allocation"] == [12288, 3], entries

h.zero(4096, 4096 * 4, nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 4096 * 5, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_FUA)
h.trim(4096, 4096 * 6, nbd.CMD_FLAG_FUA)
assert h.pread(3 * 4096, 4096 * 4) == bytes(3 * 4096)
h.cache(1 << 20, 0)
h.flush()

fails(errno.EINVAL, h.pread, 2, size - 1)
fails(errno.ENOSPC, h.pwrite, b"ab", size - 1)
fails(errno.ENOSPC, h.zero, 2, size - 1)
fails(errno.EINVAL, h.trim, 2, size - 1)
fails(errno.EINVAL, h.cache, 2, size - 1)
fails(errno.EINVAL, h.block_status, 2, size - 1, extent)
fails(errno.EINVAL, h.pread, (32 << 20) + 1, 0)
fails(errno.EINVAL, h.pread, 1, 0, nbd.CMD_FLAG_NO_HOLE)
fails(errno.EINVAL, h.trim, 4096, 0, nbd.CMD_FLAG_FAST_ZERO)

# Several connections see each other's writes.
other = nbd.NBD()
other.set_request_structured_replies(False)
other.connect_uri(URI)
assert other.can_multi_conn() and not other.can_df()
other.pwrite(b"x" * 512, 0)
assert h.pread(512, 0) == b"x" * 512
assert other.pread(1 << 20, 8 << 20) == bytes(1 << 20)

# Many in flight, completed in any order.
cookies = [h.aio_pread(nbd.Buffer(4096), i * 4096) for i in range(500)]
while any(not h.aio_command_completed(c) for c in cookies[:1]):
    h.poll(1000)
while h.aio_in_flight() > 0:
    h.poll(1000)
other.shutdown()
h.shutdown()
print("all is well")
"#;

#[test]
fn nbdsh_finds_the_protocol_kept() {
    let server = Server::start();
    let script = SHELL.replace("URI", &format!("{:?}", server.uri("disk")));
    let printed = run("nbdsh", &["-c", &script]);
    assert!(printed.contains("all is well"), "{printed}");
}

#[test]
fn fio_verifies_what_it_writes() {
    let server = Server::start();
    let uri = format!("--uri={}", server.uri("disk"));
    let common = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--size=24M",
        "--iodepth=32",
        "--randrepeat=1",
        "--verify_state_save=0",
    ];
    for shape in [
        &["--rw=randwrite", "--bs=4k", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1"][..],
        &[
            "--rw=randrw",
            "--bsrange=512-256k",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--serialize_overlap=1",
        ],
        &["--rw=randtrimwrite", "--bs=16k", "--number_ios=1000"],
    ] {
        let printed = run("fio", &[&common[..], shape].concat());
        assert!(printed.contains("err= 0"), "{printed}");
    }
}
