//! Bad input: each case ends in an error that names the object and the remedy, with DISK consistent and resumable.

use crate::common::http::{Fault, HttpServer};
use crate::common::rogue::{self, Rogue};
use crate::common::*;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// A scratch directory and the DISK that streams in it are to make.
fn scratch_and_disk() -> (Scratch, String) {
    let scratch = Scratch::new();
    let disk = scratch.path("disk.qcow2");
    (scratch, disk)
}

/// Streaming `source` must fail with these words, and without a trace of DISK.
#[track_caller]
fn refused(source: &str, words: &[&str]) {
    let (_scratch, disk) = scratch_and_disk();
    headwater(&["stream", source, &disk]).code(1).says(words);
    assert!(!std::path::Path::new(&disk).exists(), "an overlay of nothing was left behind");
}

/// Overwrites bytes of a file.
fn patch(path: &str, at: u64, bytes: &[u8]) {
    std::fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// A qcow2 image of 4 MiB, half of it data.
fn image(scratch: &Scratch, name: &str) -> String {
    let path = scratch.path(name);
    tool("qemu-img", &["create", "-qf", "qcow2", &path, "4M"]);
    tool("qemu-io", &["-c", "write -P 5 0 2M", &path]);
    path
}

#[test]
fn a_source_that_is_missing() {
    let scratch = Scratch::new();
    refused(&scratch.path("nothing.qcow2"), &["nothing.qcow2", "No such file"]);
    refused(&scratch.path("."), &["directory"]);
}

#[test]
fn a_disk_that_cannot_be_made() {
    let scratch = Scratch::new();
    let raw = scratch.path("a.raw");
    make_raw(&raw, MIB, 1);
    headwater(&["stream", &raw, &scratch.path("no/where.qcow2")])
        .code(1)
        .says(&["no/where.qcow2", "No such file"]);
}

#[test]
fn a_disk_that_is_something_else() {
    let scratch = Scratch::new();
    let (raw, other) = (scratch.path("a.raw"), scratch.path("b.raw"));
    make_raw(&raw, MIB, 1);
    make_raw(&other, MIB, 2);
    let before = read_file(&other);
    headwater(&["stream", &raw, &other]).code(1).says(&["b.raw", "qcow2"]);
    assert!(read_file(&other) == before);
    headwater(&["stream", &raw, &raw]).code(1).says(&["a.raw"]);
    // An overlay of another source is not touched either.
    let disk = scratch.path("disk.qcow2");
    tool("qemu-img", &["create", "-qf", "qcow2", "-b", "b.raw", "-F", "raw", &disk]);
    headwater(&["stream", &raw, &disk]).code(1).says(&["disk.qcow2", "a.raw", "b.raw"]);
    assert_sound(&disk);
    // Nor is the source itself taken for a disk that is complete.
    let source = image(&scratch, "source.qcow2");
    headwater(&["stream", &source, &source]).code(1).says(&["source.qcow2"]);
}

#[test]
fn images_that_are_truncated() {
    let scratch = Scratch::new();
    let source = image(&scratch, "cut.qcow2");
    let whole = read_file(&source);
    for len in [4, 60, 100, 65536] {
        std::fs::write(&source, &whole[..len]).unwrap();
        refused(&source, &["cut.qcow2"]);
    }
    // The L1 table is there, and the L2 table that it leads to is not.
    std::fs::write(&source, &whole[..65536 * 4]).unwrap();
    let disk = scratch.path("disk.qcow2");
    headwater(&["stream", &source, &disk]).code(1).says(&["cut.qcow2"]);
    assert_sound(&disk);
    std::fs::remove_file(&disk).unwrap();
    // Only data are missing: what is there streams in, the rest is an error or reads as zeroes, as for qemu-img.
    std::fs::write(&source, &whole[..whole.len() - 65536]).unwrap();
    let ended = headwater(&["stream", &source, &disk]);
    assert!(matches!(ended.code, Some(0 | 1)), "{}", ended.stderr);
    assert_sound(&disk);
}

#[test]
fn images_that_are_corrupt() {
    let scratch = Scratch::new();
    let source = image(&scratch, "corrupt.qcow2");
    let good = read_file(&source);
    // The version, the size of clusters, the size of the disk, L1's length, L1's place, an incompatible feature.
    let cases: [(u64, &[u8], &str); 6] = [
        (4, &9u32.to_be_bytes(), "version"),
        (20, &60u32.to_be_bytes(), "cluster"),
        (24, &u64::MAX.to_be_bytes(), "disk of"),
        (36, &u32::MAX.to_be_bytes(), "L1"),
        (40, &(1u64 << 50).to_be_bytes(), "L1"),
        (72, &(1u64 << 40).to_be_bytes(), "feature"),
    ];
    for (at, bytes, word) in cases {
        std::fs::write(&source, &good).unwrap();
        patch(&source, at, bytes);
        refused(&source, &["corrupt.qcow2", word]);
    }
    // Damage that shows only when the data are read: the L1 entry points beyond the file.
    std::fs::write(&source, &good).unwrap();
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap());
    patch(&source, l1, &(1u64 << 63 | 1 << 45).to_be_bytes());
    let disk = scratch.path("disk.qcow2");
    headwater(&["stream", &source, &disk]).code(1).says(&["corrupt.qcow2"]);
    assert_sound(&disk);
}

#[test]
fn formats_that_are_not_ours() {
    let scratch = Scratch::new();
    let vmdk = scratch.path("a.vmdk");
    tool("qemu-img", &["create", "-qf", "vmdk", &vmdk, "1M"]);
    refused(&vmdk, &["a.vmdk", "VMDK", "qemu-img convert"]);
}

#[test]
fn a_chain_that_bites_its_tail() {
    let scratch = Scratch::new();
    let (a, b) = (image(&scratch, "a.qcow2"), image(&scratch, "b.qcow2"));
    tool("qemu-img", &["rebase", "-u", "-b", "b.qcow2", "-F", "qcow2", &a]);
    tool("qemu-img", &["rebase", "-u", "-b", "a.qcow2", "-F", "qcow2", &b]);
    refused(&a, &["a.qcow2"]);
    tool("qemu-img", &["rebase", "-u", "-b", "a.qcow2", "-F", "qcow2", &a]);
    refused(&a, &["a.qcow2"]);
}

#[test]
fn a_backing_that_nobody_allowed() {
    let scratch = Scratch::new();
    for dir in ["one", "two"] {
        std::fs::create_dir(scratch.path(dir)).unwrap();
    }
    let secret = scratch.path("one/secret.raw");
    make_raw(&secret, MIB, 1);
    let source = scratch.path("two/source.qcow2");
    tool("qemu-img", &["create", "-qf", "qcow2", "-b", &secret, "-F", "raw", &source]);
    refused(&source, &["source.qcow2", "secret.raw", "--allow-backing"]);
    let disk = scratch.path("disk.qcow2");
    headwater(&["stream", &source, &disk, "--allow-backing", &secret]).code(0);
    assert_streamed(&disk, &secret, "raw");
    for name in ["nbd://127.0.0.1:1/x", "json:{\"driver\":\"null-co\"}", "/dev/null", "fat:/etc"] {
        tool("qemu-img", &["rebase", "-u", "-b", name, "-F", "raw", &source]);
        refused(&source, &["source.qcow2", "--allow-backing"]);
    }
}

#[test]
fn a_backing_that_is_missing_or_not_what_it_should_be() {
    let scratch = Scratch::new();
    let source = scratch.path("source.qcow2");
    tool("qemu-img", &["create", "-quf", "qcow2", "-b", "gone.raw", "-F", "raw", &source, "4M"]);
    refused(&source, &["source.qcow2", "gone.raw"]);
    // Recorded as qcow2, but raw.
    make_raw(&scratch.path("gone.raw"), MIB, 1);
    tool("qemu-img", &["rebase", "-u", "-b", "gone.raw", "-F", "qcow2", &source]);
    refused(&source, &["gone.raw"]);
    // Smaller and larger than the overlay: zeroes follow, or the rest doesn't show.
    for (size, name) in [(MIB, "small"), (6 * MIB, "large")] {
        make_raw(&scratch.path("gone.raw"), size, 1);
        tool("qemu-img", &["rebase", "-u", "-b", "gone.raw", "-F", "raw", &source]);
        let disk = scratch.path(name);
        headwater(&["stream", &source, &disk]).code(0);
        assert_streamed(&disk, &source, "qcow2");
    }
}

#[test]
fn addresses_that_are_wrong() {
    let (scratch, disk) = scratch_and_disk();
    let raw = scratch.path("a.raw");
    make_raw(&raw, MIB, 1);
    for source in [
        "nbd://",
        "nbd+unix:///x",
        "nbds://host/x",
        "nbd://host:port/x",
        "ftp://host/x",
        "http://",
        "https:///x",
    ] {
        let ended = headwater(&["stream", source, &disk]).code(2);
        assert!(ended.stderr.contains(source), "{}", ended.stderr);
    }
    for serve in ["disk", "nbd+unix:///x", "http://localhost/", "nbd://:1", "nbd://h/x#y"] {
        let ended = headwater(&["stream", &raw, &disk, "--serve", serve]).code(2);
        assert!(ended.stderr.contains(serve), "{}", ended.stderr);
    }
    refused(&format!("nbd://127.0.0.1:{}/x", free_port()), &["127.0.0.1", "refused"]);
    refused(&format!("http://127.0.0.1:{}/x", free_port()), &["127.0.0.1", "refused"]);
    refused(&format!("nbd+unix:///x?socket={}", scratch.path("none.sock")), &["none.sock"]);
    refused("http://name.invalid/x", &["name.invalid"]);
    let kit = scratch.path("kit.sock");
    let _kit = Background::nbdkit(
        &kit,
        &["--filter=exportname", "memory", "1M", "exportname=here", "exportname-strict=true"],
    );
    refused(&format!("nbd+unix:///there?socket={kit}"), &["there"]);
    assert!(!std::path::Path::new(&disk).exists());
}

#[test]
fn an_address_to_serve_at_that_is_taken() {
    let (scratch, disk) = scratch_and_disk();
    let (raw, other) = (scratch.path("a.raw"), scratch.path("other.qcow2"));
    make_raw(&raw, MIB, 1);
    let uri = scratch.uri("disk");
    let mut first = Running::start(&["serve", &raw, "--format", "raw", "--read-only", "--serve", &uri]);
    first.wait_for_socket(&scratch.path("disk.sock"));
    headwater(&["stream", &raw, &other, "--serve", &uri]).code(1).says(&["disk.sock"]);
    // A socket that nobody listens at any more is no obstacle, though.
    first.kill();
    headwater(&["stream", &raw, &disk, "--serve", &uri, "--exit-when-done"]).code(0);
}

#[test]
fn a_block_device_where_there_cannot_be_one() {
    let scratch = Scratch::new();
    let raw = scratch.path("a.raw");
    make_raw(&raw, 100, 1);
    headwater(&["serve", &raw, "--serve", "ublk:"]).code(1).says(&["a.raw", "100 bytes, less than a block"]);
    make_raw(&raw, MIB, 1);
    headwater(&["serve", &raw, "--serve", "ublk:?logical-block-size=8K"])
        .code(1)
        .says(&["8192", "512 to 4096"]);
    // Where the kernel has the driver, tests/guest does more than this would.
    if !std::path::Path::new("/dev/ublk-control").exists() {
        headwater(&["serve", &raw, "--serve", "ublk:"]).code(1).says(&["no ublk driver", "modprobe"]);
    }
}

#[test]
fn servers_that_do_not_speak_nbd() {
    refused(&rogue::start(Rogue::Closes), &["nbd://127.0.0.1"]);
    refused(&rogue::start(Rogue::Garbage), &["nbd://127.0.0.1"]);
    refused(&rogue::start(Rogue::GarbageLater), &["nbd://127.0.0.1"]);
    let (_scratch, disk) = scratch_and_disk();
    let uri = rogue::start(Rogue::GarbageReplies);
    headwater(&["stream", &uri, &disk, "--source-format", "raw"]).code(1).says(&["nbd://127.0.0.1"]);
}

#[test]
fn an_nbd_source_that_goes_away_and_comes_back() {
    let (scratch, disk) = scratch_and_disk();
    let (raw, socket) = (scratch.path("a.raw"), scratch.path("kit.sock"));
    make_raw(&raw, 16 * MIB, 1);
    let kit = Background::nbdkit(&socket, &["file", &raw]);
    let source = format!("nbd+unix:///?socket={socket}");
    let args = ["stream", &source, &disk, "--rate", "4M", "--retry", "1", "--wait", "0", "--json"];
    let mut running = Running::start(&args);
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(MIB));
    drop(kit);
    let ended = running.wait().code(1);
    assert_eq!(ended.last_json()["result"], "failed");
    let ended = ended.says(&["kit.sock"]);
    assert!(ended.stderr.contains("headwater stream"), "it doesn't say how to go on: {}", ended.stderr);
    assert_sound(&disk);
    let _kit = Background::nbdkit(&socket, &["file", &raw]);
    tool("qemu-img", &["compare", &disk, &raw]);
    headwater(&["stream", &source, &disk]).code(0);
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn clients_keep_their_disk_when_the_source_goes_away() {
    let (scratch, disk) = scratch_and_disk();
    let (raw, socket, uri) = (scratch.path("a.raw"), scratch.path("kit.sock"), scratch.uri("disk"));
    make_raw(&raw, 16 * MIB, 1);
    let kit = Background::nbdkit(&socket, &["file", &raw]);
    let source = format!("nbd+unix:///?socket={socket}");
    let mut running = Running::start(&[
        "stream", &source, &disk, "--serve", &uri, "--rate", "4M", "--retry", "0", "--wait", "0", "--json",
    ]);
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(MIB));
    nbdsh(&uri, "h.pwrite(b'mine' * 1000, 12_000_000)\nh.flush()");
    drop(kit);
    running.wait_for_status("the failure", |status| status["result"] == "failed");
    nbdsh(&uri, "assert h.pread(4000, 12_000_000) == b'mine' * 1000\nassert h.pread(4096, 0)");
    running.signal("TERM");
    let ended = running.wait().code(1).says(&["kit.sock"]);
    let finals = ended.stdout.lines().filter(|line| line.contains("\"result\"")).count();
    assert_eq!(finals, 1, "{}", ended.stdout);
    assert_sound(&disk);
}

#[test]
fn an_nbd_source_that_comes_back_with_another_size() {
    let (scratch, disk) = scratch_and_disk();
    let (raw, socket) = (scratch.path("a.raw"), scratch.path("kit.sock"));
    make_raw(&raw, 16 * MIB, 1);
    let kit = Background::nbdkit(&socket, &["file", &raw]);
    let source = format!("nbd+unix:///?socket={socket}");
    let mut running = Running::start(&["stream", &source, &disk, "--rate", "4M", "--json"]);
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(MIB));
    drop(kit);
    make_raw(&raw, 15 * MIB, 1);
    let _kit = Background::nbdkit(&socket, &["file", &raw]);
    running.wait().code(1).says(&["kit.sock", "15728640", "not the same disk"]);
    assert_sound(&disk);
}

#[test]
fn a_source_whose_reads_fail() {
    let (scratch, disk) = scratch_and_disk();
    let (raw, socket, trigger) = (scratch.path("a.raw"), scratch.path("kit.sock"), scratch.path("trigger"));
    make_raw(&raw, 8 * MIB, 1);
    let trigger_arg = format!("error-file={trigger}");
    let _kit = Background::nbdkit(
        &socket,
        &["--filter=error", "file", &raw, "error-pread=EIO", "error-pread-rate=100%", &trigger_arg],
    );
    let source = format!("nbd+unix:///?socket={socket}");
    // With `stop` the job waits for the operator.
    let control = scratch.path("control.sock");
    let mut running = Running::start(&[
        "stream",
        &source,
        &disk,
        "--on-error",
        "stop",
        "--json",
        "--rate",
        "4M",
        "--control",
        &control,
    ]);
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(MIB));
    std::fs::write(&trigger, "").unwrap();
    running.wait_for_status("a pause", |status| {
        status["state"] == "paused" && status["waiting_for"].is_string()
    });
    running.wait_until("word of it", |running| running.err().contains("paused, because of this"));
    std::fs::remove_file(&trigger).unwrap();
    headwater(&["ctl", &control, "rate", "0"]).code(0);
    headwater(&["ctl", &control, "resume"]).code(0);
    running.wait().code(0);
    assert_streamed(&disk, &raw, "raw");
    // With `ignore` the rest is copied, and the disk keeps its source.
    std::fs::remove_file(&disk).unwrap();
    let mut running =
        Running::start(&["stream", &source, &disk, "--on-error", "ignore", "--json", "--rate", "8M"]);
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(MIB));
    std::fs::write(&trigger, "").unwrap();
    running.wait().code(1).says(&["kit.sock"]);
    std::fs::remove_file(&trigger).unwrap();
    assert_sound(&disk);
    tool("qemu-img", &["compare", &disk, &raw]);
    headwater(&["stream", &source, &disk]).code(0);
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn http_servers_that_cannot_be_used() {
    let content = noise(1, 4 << 20);
    let of = |fault| HttpServer::start(content.clone(), fault, Duration::ZERO);
    let server = of(Fault::IgnoresRanges);
    refused(&server.url, &["127.0.0.1", "ange"]);
    let server = of(Fault::NotFound);
    refused(&server.url, &["127.0.0.1", "404"]);
}

#[test]
fn http_sources_that_change_while_they_stream() {
    let content = noise(1, 8 << 20);
    for fault in [Fault::ChangesEtag, Fault::ChangesSize] {
        let (scratch, disk) = scratch_and_disk();
        let raw = scratch.path("a.raw");
        std::fs::write(&raw, &content).unwrap();
        let server = HttpServer::start(content.clone(), fault, Duration::ZERO);
        let args = ["stream", &server.url, &disk, "--rate", "2M", "--json"];
        let mut running = Running::start(&args);
        running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(MIB));
        server.turn();
        running.wait().code(1).says(&["127.0.0.1", "changed"]);
        assert_sound(&disk);
    }
}

#[test]
fn an_http_source_that_cuts_answers_short() {
    let (scratch, disk) = scratch_and_disk();
    let raw = scratch.path("a.raw");
    let content = noise(2, 8 << 20);
    std::fs::write(&raw, &content).unwrap();
    let server = HttpServer::start(content, Fault::CutsShort, Duration::ZERO);
    let args = ["stream", &server.url, &disk, "--rate", "2M", "--retry", "1", "--wait", "0", "--json"];
    let mut running = Running::start(&args);
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(MIB));
    server.turn();
    running.wait().code(1).says(&["127.0.0.1"]);
    assert_sound(&disk);
}

#[test]
fn a_disk_that_another_process_uses() {
    let (scratch, disk) = scratch_and_disk();
    let raw = scratch.path("a.raw");
    make_raw(&raw, 8 * MIB, 1);
    let uri = scratch.uri("disk");
    let mut first = Running::start(&["stream", &raw, &disk, "--serve", &uri, "--rate", "1M"]);
    first.wait_for_socket(&scratch.path("disk.sock"));
    headwater(&["stream", &raw, &disk]).code(1).says(&["disk.qcow2", "use"]);
    headwater(&["check", &disk, "--repair", "all"]).code(1).says(&["disk.qcow2", "use"]);
    let qemu = tool_output("qemu-io", &["-c", "write 0 512", &disk]);
    assert!(!qemu.status.success(), "QEMU didn't see the lock");
    first.signal("TERM");
    first.wait().code(130);
    // The other way round.
    let _qemu = Background::start("qemu-nbd", &["-k", &scratch.path("qemu.sock"), "-t", &disk]);
    wait_for_file(&scratch.path("qemu.sock"));
    headwater(&["stream", &raw, &disk]).code(1).says(&["disk.qcow2", "use"]);
}

#[test]
fn a_local_source_that_shrinks() {
    let (scratch, disk) = scratch_and_disk();
    let raw = scratch.path("a.raw");
    std::fs::write(&raw, noise(3, 16 << 20)).unwrap();
    let mut running = Running::start(&["stream", &raw, &disk, "--rate", "4M", "--json"]);
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(MIB));
    std::fs::File::options().write(true).open(&raw).unwrap().set_len(2 << 20).unwrap();
    running.wait().code(1).says(&["a.raw"]);
    assert_sound(&disk);
}

#[test]
fn command_lines_that_are_wrong() {
    for args in [
        &["stream"][..],
        &["stream", "a"],
        &["stream", "a", "nbd://host/disk"],
        &["stream", "a", "b", "--rate", "fast"],
        &["stream", "a", "b", "--on-error", "panic"],
        &["stream", "a", "b", "--cluster-size", "3K"],
        &["frobnicate"],
        &["create", "a.qcow2", "12 parrots"],
        &["ctl", "path", "rate"],
    ] {
        headwater(args).code(2);
    }
    headwater(&["--help"]).code(0);
    headwater(&["--version"]).code(0);
    headwater::<&str>(&[]).code(2);
}
