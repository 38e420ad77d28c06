//! `headwater stream` with real sources, real clients and qemu-img as the judge.

use crate::common::http::{Fault, HttpServer};
use crate::common::*;
use std::time::Duration;

/// Streams `source` to the end and checks the result against `judge`, a file of the same contents.
#[track_caller]
fn stream_and_compare(source: &str, scratch: &Scratch, judge: &str, judge_format: &str) -> String {
    let disk = scratch.path("disk.qcow2");
    let ended = headwater(&["stream", source, &disk, "--exit-when-done", "--json"]).code(0);
    let last = ended.last_json();
    assert_eq!(last["result"], "completed", "{last}");
    assert_eq!(last["remaining"], 0, "{last}");
    assert_streamed(&disk, judge, judge_format);
    disk
}

#[test]
fn a_raw_file_streams_and_the_result_is_sparse() {
    let scratch = Scratch::new();
    let raw = scratch.path("source.raw");
    make_raw(&raw, 24 * MIB + 12345 / 512 * 512, 1);
    let disk = stream_and_compare(&raw, &scratch, &raw, "raw");
    // Three of five runs hold data; zeroes, written or not, take no space.
    let data = allocated(&disk);
    assert!(data < 24 * MIB * 7 / 10, "{data} bytes for about {} of data", 24 * MIB * 3 / 5);
}

#[test]
fn a_raw_file_of_an_odd_size_streams() {
    let scratch = Scratch::new();
    let raw = scratch.path("source.raw");
    make_raw(&raw, 3 * MIB + 777, 2);
    let disk = scratch.path("disk.qcow2");
    headwater(&["stream", &raw, &disk]).code(0);
    assert_sound(&disk);
    let info: serde_json::Value =
        serde_json::from_str(&tool("qemu-img", &["info", "--output=json", &disk])).unwrap();
    assert!(info["virtual-size"].as_u64().unwrap() >= 3 * MIB + 777);
    let back = scratch.path("back.raw");
    tool("qemu-img", &["convert", "-O", "raw", &disk, &back]);
    let (back, source) = (read_file(&back), read_file(&raw));
    assert!(back[..source.len()] == source[..]);
    assert!(back[source.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_qcow2_chain_streams_into_one_image() {
    let scratch = Scratch::new();
    let (raw, bottom, middle, top) =
        (scratch.path("a.raw"), scratch.path("a.qcow2"), scratch.path("b.qcow2"), scratch.path("c.qcow2"));
    make_raw(&raw, 16 * MIB, 3);
    tool("qemu-img", &["convert", "-O", "qcow2", "-c", &raw, &bottom]);
    tool("qemu-img", &["create", "-qf", "qcow2", "-b", "a.qcow2", "-F", "qcow2", &middle]);
    tool("qemu-io", &["-c", "write -P 7 1M 3M", "-c", "write -z 6M 1M", &middle]);
    // Grown beyond its backing, with other clusters and with subclusters.
    let options = "extended_l2=on,cluster_size=128k";
    tool("qemu-img", &["create", "-qf", "qcow2", "-o", options, "-b", "b.qcow2", "-F", "qcow2", &top, "20M"]);
    tool("qemu-io", &["-c", "write -P 9 4000k 3k", "-c", "write -P 8 17M 64k", &top]);
    stream_and_compare(&top, &scratch, &top, "qcow2");
}

#[test]
fn an_nbd_export_streams() {
    let scratch = Scratch::new();
    let (raw, socket) = (scratch.path("source.raw"), scratch.path("kit.sock"));
    make_raw(&raw, 16 * MIB, 4);
    let _kit = Background::nbdkit(&socket, &["file", &raw]);
    stream_and_compare(&format!("nbd+unix:///?socket={socket}"), &scratch, &raw, "raw");
}

#[test]
fn an_nbd_export_streams_over_tls() {
    let scratch = Scratch::new();
    let (raw, certificates) = (scratch.path("source.raw"), scratch.path("certificates"));
    make_raw(&raw, 8 * MIB + 512, 11);
    tool(concat!(env!("CARGO_MANIFEST_DIR"), "/../headwater-tls/tests/make-certificates"), &[&certificates]);
    let plain = scratch.uri("golden");
    let tls = format!("{}&tls-certificates={certificates}", plain.replace("nbd+unix", "nbds+unix"));
    let mut far = Running::start(&["serve", &raw, "--format", "raw", "--read-only", "--serve", &tls]);
    far.wait_for_socket(&scratch.path("golden.sock"));
    let disk = scratch.path("disk.qcow2");
    headwater(&["stream", &plain, &disk]).code(1).says(&["requires TLS"]);
    headwater(&["stream", &tls, &disk]).code(1).says(&["host name", "tls-hostname"]);
    stream_and_compare(&format!("{tls}&tls-hostname=localhost"), &scratch, &raw, "raw");
    let nowhere = plain.replace("nbd+unix", "nbds+unix") + "&tls-certificates=/nowhere";
    headwater(&["serve", &raw, "--format", "raw", "--read-only", "--serve", &nowhere])
        .code(1)
        .says(&["/nowhere/server-cert.pem"]);
}

#[test]
fn a_qcow2_image_behind_an_nbd_export_streams() {
    let scratch = Scratch::new();
    let (raw, image, socket) =
        (scratch.path("source.raw"), scratch.path("image.qcow2"), scratch.path("kit.sock"));
    make_raw(&raw, 8 * MIB, 5);
    to_qcow2(&raw, &image);
    let _kit = Background::nbdkit(&socket, &["--readonly", "file", &image]);
    stream_and_compare(&format!("nbd+unix:///?socket={socket}"), &scratch, &raw, "raw");
}

#[test]
fn images_behind_http_stream() {
    let scratch = Scratch::new();
    let (raw, image) = (scratch.path("source.raw"), scratch.path("image.qcow2"));
    make_raw(&raw, 8 * MIB, 6);
    to_qcow2(&raw, &image);
    for file in [&raw, &image] {
        let server = HttpServer::start(read_file(file), Fault::None, Duration::ZERO);
        let disk = stream_and_compare(&server.url, &scratch, &raw, "raw");
        std::fs::remove_file(disk).unwrap();
    }
}

#[test]
fn a_terabyte_is_served_in_less_than_a_second() {
    let scratch = Scratch::new();
    let (raw, disk) = (scratch.path("source.raw"), scratch.path("disk.qcow2"));
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(1 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(1, 4096), 1 << 39).unwrap();
    let uri = scratch.uri("disk");
    let args = ["stream", raw.as_str(), &disk, "--serve", &uri, "--json"];
    // The machine may be busy with other tests: one of a few attempts counts.
    let attempt = || {
        let _ = std::fs::remove_file(&disk);
        let start = now();
        let mut running = Running::start(&args);
        running.wait_for_socket(&scratch.path("disk.sock"));
        let size = tool("nbdinfo", &["--size", &uri]);
        let took = elapsed(start);
        assert_eq!(size.trim(), (1u64 << 40).to_string());
        (took < Duration::from_secs(1)).then_some(running)
    };
    let mut running = (0..5).find_map(|_| attempt()).expect("less than a second");
    nbdsh(
        &uri,
        "assert h.pread(4096, 1<<39) != bytearray(4096); assert h.pread(4096, 5<<37) == bytearray(4096)",
    );
    running.wait_for_status("completion", |status| status["state"] == "completed");
    running.signal("TERM");
    running.wait().code(0);
    assert_sound(&disk);
    // Nothing is written for what the source lacks.
    assert!(allocated(&disk) < 8 * MIB, "{}", allocated(&disk));
}

#[test]
fn only_what_lies_above_the_base_is_streamed() {
    let scratch = Scratch::new();
    let (raw, base, top, disk) = (
        scratch.path("a.raw"),
        scratch.path("base.qcow2"),
        scratch.path("top.qcow2"),
        scratch.path("disk.qcow2"),
    );
    make_raw(&raw, 8 * MIB, 7);
    to_qcow2(&raw, &base);
    tool("qemu-img", &["create", "-qf", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &top]);
    tool("qemu-io", &["-c", "write -P 7 1M 2M", &top]);
    headwater(&["stream", &top, &disk, "--base", &base]).code(0);
    assert_sound(&disk);
    let info: serde_json::Value =
        serde_json::from_str(&tool("qemu-img", &["info", "--output=json", &disk])).unwrap();
    assert!(info["full-backing-filename"].as_str().unwrap().ends_with("base.qcow2"), "{info}");
    tool("qemu-img", &["compare", &disk, &top]);
    assert!(allocated(&disk) < 4 * MIB, "the base was copied as well: {}", allocated(&disk));
    let again = headwater(&["stream", &top, &disk, "--base", &base]).code(0);
    assert!(again.stderr.contains("complete"), "{}", again.stderr);
    let foreign = headwater(&["stream", &top, &scratch.path("d2.qcow2"), "--base", &raw]);
    foreign.code(1).says(&["a.raw", "top.qcow2"]);
}

#[test]
fn fio_verifies_what_it_writes_while_the_disk_streams() {
    let scratch = Scratch::new();
    let (raw, disk, socket) =
        (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("kit.sock"));
    make_raw(&raw, 48 * MIB, 8);
    let _kit = Background::nbdkit(&socket, &["--filter=delay", "file", &raw, "delay-read=5ms"]);
    let (source, uri) = (format!("nbd+unix:///?socket={socket}"), scratch.uri("disk"));
    let args = ["stream", &source, &disk, "--serve", &uri, "--rate", "12M", "--json"];
    let mut running = Running::start(&args);
    running.wait_for_socket(&scratch.path("disk.sock"));
    let size = "--size=32M";
    let uri_arg = format!("--uri={uri}");
    let fio = [
        "--name=verify",
        "--ioengine=nbd",
        &uri_arg,
        "--rw=randrw",
        "--bsrange=512-128k",
        "--blockalign=512",
        "--iodepth=8",
        size,
        "--verify=crc32c",
        "--verify_fatal=1",
        "--thread",
        "--randseed=3",
        "--io_size=12M",
        "--norandommap=0",
    ];
    let dir = scratch.path(".");
    let output = std::process::Command::new("fio").args(fio).current_dir(dir).output().expect("fio");
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    running.wait_for_status("completion", |status| status["state"] == "completed");
    // What fio didn't touch is the source's: its last third.
    let script = format!(
        "f = open('{raw}', 'rb')\nf.seek(33<<20)\nassert h.pread(8<<20, 33<<20) == f.read(8<<20)\nh.shutdown()"
    );
    nbdsh(&uri, &script);
    running.signal("INT");
    running.wait().code(0);
    assert_sound(&disk);
}

#[test]
fn several_clients_work_at_once_while_the_disk_streams() {
    let scratch = Scratch::new();
    let (raw, disk, socket) =
        (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("kit.sock"));
    make_raw(&raw, 32 * MIB, 9);
    let _kit = Background::nbdkit(&socket, &["--filter=delay", "file", &raw, "delay-read=10ms"]);
    let (source, uri) = (format!("nbd+unix:///?socket={socket}"), scratch.uri("disk"));
    let mut running = Running::start(&["stream", &source, &disk, "--serve", &uri, "--rate", "16M", "--json"]);
    running.wait_for_socket(&scratch.path("disk.sock"));
    std::thread::scope(|scope| {
        // One copies the whole disk, one writes and reads back, one discards what it wrote; each in its own MiB.
        let copy = scratch.path("copy.raw");
        let (target, from) = (copy.clone(), uri.clone());
        let copying = scope.spawn(move || tool("nbdcopy", &[from, target]));
        for client in 0..3u64 {
            let uri = &uri;
            scope.spawn(move || {
                let at = (28 + client) * MIB;
                let script = format!(
                    "import os\nfor i in range(40):\n a = {at} + i * 9000\n d = bytearray(os.urandom(8999))\n h.pwrite(d, a)\n \
                     assert h.pread(8999, a) == d\n h.zero(4096, a)\n assert h.pread(4096, a) == bytearray(4096)\n \
                     assert h.pread(4000, a + 4096) == d[4096:8096]\n h.trim(8999, a)\nh.flush()\nh.shutdown()"
                );
                nbdsh(uri, &script);
            });
        }
        copying.join().expect("nbdcopy");
        let (copied, source) = (read_file(&copy), read_file(&raw));
        assert!(copied[..28 << 20] == source[..28 << 20], "the copy differs where nobody wrote");
    });
    running.wait_for_status("completion", |status| status["state"] == "completed");
    // The qemu tools through NBD see the same disk as in the file afterwards.
    let before = scratch.path("before.raw");
    tool("qemu-img", &["convert", "-O", "raw", &uri, &before]);
    running.signal("TERM");
    running.wait().code(0);
    assert_streamed(&disk, &before, "raw");
}

#[test]
fn a_running_stream_is_controlled_through_its_socket() {
    let scratch = Scratch::new();
    let (raw, disk, control) =
        (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("control.sock"));
    make_raw(&raw, 32 * MIB, 10);
    let mut running =
        Running::start(&["stream", &raw, &disk, "--control", &control, "--rate", "1M", "--json"]);
    running.wait_for_socket(&control);
    headwater(&["ctl", &control, "pause"]).code(0);
    let status = headwater(&["ctl", &control, "status"]).code(0).last_json();
    assert_eq!(status["state"], "paused", "{status}");
    assert_eq!(status["rate_limit"], 1 << 20, "{status}");
    headwater(&["ctl", &control, "nonsense"]).code(2);
    headwater(&["ctl", &control, "rate", "0"]).code(0);
    headwater(&["ctl", &control, "resume"]).code(0);
    running.wait().code(0);
    assert_streamed(&disk, &raw, "raw");
    headwater(&["ctl", &control, "status"]).code(1).says(&["control.sock", "running"]);
}

#[test]
fn cancelling_through_the_socket_leaves_a_disk_that_resumes() {
    let scratch = Scratch::new();
    let (raw, disk, control) =
        (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("control.sock"));
    make_raw(&raw, 16 * MIB, 11);
    let mut running = Running::start(&["stream", &raw, &disk, "--control", &control, "--rate", "4M"]);
    running.wait_for_socket(&control);
    let answer = headwater(&["ctl", &control, "cancel"]).code(0);
    assert_eq!(answer.stdout.trim(), "cancelled");
    let ended = running.wait().code(4);
    assert!(ended.stderr.contains("headwater stream"), "{}", ended.stderr);
    assert_sound(&disk);
    tool("qemu-img", &["compare", &disk, &raw]);
    headwater(&["stream", &raw, &disk]).code(0);
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn threads_and_the_page_cache_do_as_well() {
    let scratch = Scratch::new();
    let raw = scratch.path("source.raw");
    make_raw(&raw, 6 * MIB, 12);
    for (io, cache) in [("threads", "direct"), ("threads", "buffered"), ("auto", "buffered")] {
        let disk = scratch.path("disk.qcow2");
        headwater(&["stream", &raw, &disk, "--io", io, "--cache", cache, "--cluster-size", "16K"]).code(0);
        assert_streamed(&disk, &raw, "raw");
        std::fs::remove_file(&disk).unwrap();
    }
}

#[test]
fn the_backing_is_recorded_so_that_other_tools_find_it() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("elsewhere")).unwrap();
    let raw = scratch.path("source.raw");
    make_raw(&raw, 4 * MIB, 13);
    for (disk, recorded) in [("disk.qcow2", "source.raw"), ("elsewhere/disk.qcow2", raw.as_str())] {
        let disk = scratch.path(disk);
        let running = Running::start(&["stream", &raw, &disk, "--rate", "1M", "--json"]);
        wait_for_file(&disk);
        running.signal("TERM");
        running.wait().code(130);
        let info: serde_json::Value =
            serde_json::from_str(&tool("qemu-img", &["info", "--output=json", &disk])).unwrap();
        assert_eq!(info["backing-filename"], recorded, "{info}");
        assert_eq!(info["backing-filename-format"], "raw", "{info}");
        tool("qemu-img", &["compare", &disk, &raw]);
    }
}

#[test]
fn a_control_socket_that_was_left_over_is_replaced_and_one_in_use_is_not() {
    let scratch = Scratch::new();
    let (raw, disk, control) =
        (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("control.sock"));
    make_raw(&raw, 8 * MIB, 14);
    let args = ["stream", &raw, &disk, "--control", &control, "--rate", "1M"];
    let mut running = Running::start(&args);
    running.wait_for_socket(&control);
    let other = scratch.path("other.qcow2");
    headwater(&["stream", &raw, &other, "--control", &control]).code(1).says(&["control.sock", "exists"]);
    assert_sound(&other);
    running.kill();
    let mut running = Running::start(&args);
    running.wait_for_socket(&control);
    // What others look at while it is written can be shown all the same.
    for verb in ["info", "map"] {
        let shown = headwater(&[verb, &disk]).code(0).stdout;
        assert!(shown.contains("source.raw"), "{shown}");
    }
    headwater(&["ctl", &control, "cancel"]).code(0);
    running.wait().code(4);
}

/// A disk that streams as a file: for programs that know nothing of block devices, and for loop devices and mounts.
#[test]
fn a_disk_that_streams_is_used_as_a_file() {
    let scratch = Scratch::new();
    let (raw, disk, file) = (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("disk"));
    make_raw(&raw, 16 * MIB, 11);
    let fuse = format!("fuse:{file}");
    let mut running = Running::start(&["stream", &raw, &disk, "--serve", &fuse, "--rate", "4M", "--json"]);
    running.wait_until("a file", |_| std::fs::metadata(&file).is_ok_and(|file| file.len() == 16 * MIB));
    tool("qemu-img", &["compare", "-U", "-f", "raw", "-F", "raw", &raw, &file]);
    tool("qemu-io", &["-f", "raw", "-c", "write -P 5 1M 64k", "-c", "discard 2M 64k", "-c", "flush", &file]);
    running.wait_for_status("the end", |status| status["state"] == "completed");
    tool("qemu-io", &["-f", "raw", "-c", "read -P 5 1M 64k", "-c", "read -P 0 2M 64k", &file]);
    running.signal("TERM");
    let ended = running.wait().code(0);
    assert!(!ended.stderr.contains("WARN"), "{}", ended.stderr);
    assert!(std::fs::metadata(&file).is_err(), "the file that was made goes");
    tool("qemu-io", &["-f", "raw", "-c", "write -P 5 1M 64k", "-c", "write -z 2M 64k", &raw]);
    assert_streamed(&disk, &raw, "raw");
}
