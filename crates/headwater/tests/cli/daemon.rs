//! The storage daemon and the front for people, `headwater jobs`. What it says over QMP is compared with QEMU's daemon by tests/daemon.

use crate::common::http::{Fault, HttpServer};
use crate::common::monitor::Monitor;
use crate::common::*;
use serde_json::{Value, json};
use std::time::Duration;

/// A daemon with an overlay over a raw image of 16 MiB.
pub(crate) struct Daemon {
    pub(crate) scratch: Scratch,
    pub(crate) running: Running,
    raw: String,
    pub(crate) disk: String,
}

impl Daemon {
    pub(crate) fn start(seed: u64, more: &[&str]) -> Self {
        let scratch = Scratch::new();
        let (raw, disk) = (scratch.path("base.raw"), scratch.path("disk.qcow2"));
        make_raw(&raw, 16 * MIB, seed);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &disk]);
        let blockdev = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}");
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", scratch.path("qmp"));
        let mut args = vec!["daemon", "--blockdev", &blockdev, "--chardev", &chardev, "--monitor", "qmp"];
        args.extend(more);
        let mut running = Running::start(&args);
        running.wait_for_socket(&scratch.path("qmp"));
        Self { scratch, running, raw, disk }
    }

    pub(crate) fn jobs(&self, args: &[&str]) -> Ended {
        let socket = self.scratch.path("qmp");
        headwater(&[&["jobs", socket.as_str()], args].concat())
    }
}

#[test]
fn jobs_are_led_without_typing_json() {
    let daemon = Daemon::start(1, &[]);
    assert_eq!(daemon.jobs(&[]).code(0).stdout, "");
    daemon.jobs(&["stream", "disk", "--id", "fill", "--rate", "1M"]).code(0);
    let listed = daemon.jobs(&[]).code(0).stdout;
    assert!(listed.starts_with("fill  stream  running  "), "{listed}");
    daemon.jobs(&["pause", "fill"]).code(0);
    daemon.jobs(&["pause", "fill"]).code(1).says(&["already paused"]);
    let listed = daemon.jobs(&["list", "--json"]).code(0).last_json();
    assert_eq!((listed["device"].as_str(), listed["speed"].as_u64()), (Some("fill"), Some(MIB)));
    daemon.jobs(&["complete", "fill"]).code(1).says(&["'fill'", "complete"]);
    daemon.jobs(&["resume", "fill"]).code(0);
    daemon.jobs(&["rate", "fill", "0"]).code(0);
    daemon.jobs(&["watch"]).code(0);
    assert_eq!(daemon.jobs(&["list"]).code(0).stdout, "");
    daemon.running.signal("TERM");
    daemon.running.wait().code(0);
    assert_streamed(&daemon.disk, &daemon.raw, "raw");
}

#[test]
fn a_killed_daemon_leaves_a_disk_that_the_next_one_streams_to_its_end() {
    let daemon = Daemon::start(2, &[]);
    daemon.jobs(&["stream", "disk", "--rate", "4M"]).code(0);
    daemon.running.kill();
    assert_no_errors(&daemon.disk);
    let blockdev = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={}", daemon.disk);
    let chardev = format!("socket,id=qmp,path={},server=on,wait=off", daemon.scratch.path("qmp"));
    let mut next =
        Running::start(&["daemon", "--blockdev", &blockdev, "--chardev", &chardev, "--monitor", "qmp"]);
    drop(Monitor::of(&mut next, &daemon.scratch.path("qmp")));
    let socket = daemon.scratch.path("qmp");
    headwater(&["jobs", &socket, "stream", "disk"]).code(0);
    headwater(&["jobs", &socket, "watch"]).code(0);
    next.signal("INT");
    next.wait().code(0);
    assert_streamed(&daemon.disk, &daemon.raw, "raw");
}

#[test]
fn events_are_traced_under_their_names() {
    let scratch = Scratch::new();
    let trace = scratch.path("trace");
    let uri = scratch.uri("disk");
    let (_, socket) = uri.split_once("socket=").unwrap();
    let nbd = format!("addr.type=unix,addr.path={socket}");
    let patterns = ["--trace", &format!("stream_*,file={trace}"), "--trace", "bdrv_co_preadv_part"];
    let export = ["--nbd-server", &nbd, "--export", "nbd,id=e,node-name=disk"];
    let daemon = Daemon::start(3, &[&patterns[..], &export[..]].concat());
    nbdsh(&uri, "h.pread(4096, 8192)");
    daemon.jobs(&["stream", "disk"]).code(0);
    daemon.jobs(&["watch"]).code(0);
    daemon.running.signal("TERM");
    daemon.running.wait().code(0);
    let traced = String::from_utf8(read_file(&trace)).unwrap();
    assert!(traced.contains("\nstream_start ") && traced.contains("\nstream_one_iteration "), "{traced}");
    assert!(
        traced.contains("bdrv_co_preadv_part ") && traced.contains(" offset 8192 bytes 4096\n"),
        "{traced}"
    );
    assert!(!traced.contains("job_state_transition"), "only what was asked for: {traced}");
}

/// Requests that wait for a rate limit stand between the edge of the export and that of the filter below it. A transaction that holds all back lets
/// them pass, so that it must not have closed the inner edge before the outer one.
#[test]
fn a_transaction_ends_while_requests_wait_for_a_limit_and_loses_none() {
    let scratch = Scratch::new();
    let uri = scratch.uri("x");
    let nbd = format!("addr.type=unix,addr.path={}", scratch.path("x.sock"));
    let filter = "driver=throttle,node-name=filter,throttle-group=group,file=disk";
    let export = "nbd,id=e,node-name=filter,name=x,writable=on";
    let group = "throttle-group,id=group,x-iops-total=60";
    let more = ["--object", group, "--blockdev", filter, "--nbd-server", &nbd, "--export", export];
    let daemon = Daemon::start(4, &more);
    let fio = std::thread::spawn(move || {
        let uri = format!("--uri={uri}");
        let load = ["--name=load", "--ioengine=nbd", &uri, "--rw=randwrite", "--bs=16k", "--iodepth=16"];
        let verify = ["--size=1M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"];
        tool("fio", &[&load[..], &verify[..]].concat())
    });
    let mut monitor = Monitor::connect(&daemon.scratch.path("qmp"));
    let writes = |stats: &Value| {
        let of = |node: &&Value| node["node-name"] == "filter";
        stats.as_array().unwrap().iter().find(of).unwrap()["stats"]["wr_operations"].as_u64().unwrap()
    };
    while writes(&monitor.run("query-blockstats", &json!({"query-nodes": true}))) < 16 {
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut below = "disk".to_owned();
    for step in 0..8 {
        let (over, path) = (format!("over{step}"), daemon.scratch.path(&format!("over{step}.qcow2")));
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "16M"]);
        let file = json!({"driver": "file", "filename": path});
        let overlay = json!({"driver": "qcow2", "node-name": over, "backing": null, "file": file});
        monitor.run("blockdev-add", &overlay);
        let snapshot = json!({"type": "blockdev-snapshot", "data": {"node": below, "overlay": over}});
        monitor.run("transaction", &json!({"actions": [snapshot]}));
        below = over;
        std::thread::sleep(Duration::from_millis(60));
    }
    fio.join().expect("what was written is read back");
    daemon.running.signal("TERM");
    daemon.running.wait().code(0);
    assert_sound(&daemon.scratch.path(&format!("{below}.qcow2")));
}

/// qemu-storage-daemon has the driver in a module that isn't installed everywhere, so this isn't compared with it.
#[test]
fn an_image_behind_http_is_a_node_like_any_other() {
    let daemon = Daemon::start(5, &[]);
    let (scratch, image) = (&daemon.scratch, daemon.scratch.path("far.qcow2"));
    to_qcow2(&daemon.raw, &image);
    let server = HttpServer::start(read_file(&image), Fault::None, Duration::from_millis(2));
    let mut monitor = Monitor::connect(&scratch.path("qmp"));
    let file = json!({"driver": "http", "url": server.url});
    let far = json!({"driver": "qcow2", "node-name": "far", "read-only": true, "file": file});
    monitor.run("blockdev-add", &far);
    let path = scratch.path("over.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "16M"]);
    let file = json!({"driver": "file", "filename": path});
    let over = json!({"driver": "qcow2", "node-name": "over", "backing": "far", "file": file});
    monitor.run("blockdev-add", &over);
    // One client at a time: another one is told so, and doesn't wait for ever.
    daemon.jobs(&[]).code(1).says(&["one client at a time"]);
    monitor.run("block-stream", &json!({"job-id": "fill", "device": "over"}));
    while monitor.run("query-jobs", &json!({})) != json!([]) {
        std::thread::sleep(Duration::from_millis(10));
    }
    // It can't be written.
    let export = json!({"type": "nbd", "id": "e", "node-name": "far", "writable": true});
    monitor.run("nbd-server-start", &json!({"addr": {"type": "unix", "data": {"path": scratch.path("n")}}}));
    let refused = monitor.refused("block-export-add", &export);
    assert!(refused.contains("read-only"), "{refused}");
    monitor.run("blockdev-del", &json!({"node-name": "over"}));
    daemon.running.signal("TERM");
    daemon.running.wait().code(0);
    assert_streamed(&path, &daemon.raw, "raw");
}

/// What a job will read comes while it looks at the tables of an image that is far away.
#[test]
fn a_far_image_is_asked_for_what_a_job_begins_with_while_its_tables_are_read() {
    let daemon = Daemon::start(5, &[]);
    let (scratch, image) = (&daemon.scratch, daemon.scratch.path("far.qcow2"));
    to_qcow2(&daemon.raw, &image);
    let server = HttpServer::start(read_file(&image), Fault::None, Duration::from_millis(500));
    let mut monitor = Monitor::connect(&scratch.path("qmp"));
    let file = json!({"driver": "http", "url": server.url});
    let far = json!({"driver": "qcow2", "node-name": "far", "read-only": true, "file": file});
    monitor.run("blockdev-add", &far);
    let path = scratch.path("over.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "16M"]);
    let file = json!({"driver": "file", "filename": path});
    let over = json!({"driver": "qcow2", "node-name": "over", "backing": "far", "file": file});
    monitor.run("blockdev-add", &over);
    let (before, answered) = server.requests();
    assert_eq!(before, answered, "nothing is under way");
    monitor.run("block-stream", &json!({"job-id": "fill", "device": "over"}));
    // Its first look needs a table, and so an answer.
    let start = now();
    let mut together = 0;
    while server.requests().1 == before {
        together = server.requests().0 - before;
        assert!(elapsed(start) < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(together > 4, "{together} requests had come when the first was answered");
    while monitor.run("query-jobs", &json!({})) != json!([]) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let size = std::fs::metadata(&image).unwrap().len();
    assert!(server.sent() <= size + size / 10, "{} bytes of {size} were sent", server.sent());
    monitor.run("blockdev-del", &json!({"node-name": "over"}));
    daemon.running.signal("TERM");
    daemon.running.wait().code(0);
    assert_streamed(&path, &daemon.raw, "raw");
}

/// An address in an image's header opens nothing, unless the operator allowed it by name.
#[test]
fn an_address_in_a_header_is_followed_only_if_it_was_allowed() {
    let scratch = Scratch::new();
    let content = noise(6, 4 << 20);
    let server = HttpServer::start(content, Fault::None, Duration::ZERO);
    let path = scratch.path("over.qcow2");
    tool("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", &server.url, "-F", "raw", &path, "4M"]);
    let blockdev = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={path}");
    let socket = scratch.path("qmp");
    let chardev = format!("socket,id=qmp,path={socket},server=on,wait=off");
    let args = ["daemon", "--blockdev", &blockdev, "--chardev", &chardev, "--monitor", "qmp"];
    headwater(&args).code(1).says(&[&server.url, "--allow-backing"]);
    let mut running = Running::start(&[&args[..], &["--allow-backing", &server.url]].concat());
    running.wait_for_socket(&socket);
    headwater(&["jobs", &socket, "stream", "disk"]).code(0);
    headwater(&["jobs", &socket, "watch"]).code(0);
    running.signal("TERM");
    running.wait().code(0);
    let raw = scratch.path("content.raw");
    std::fs::write(&raw, noise(6, 4 << 20)).unwrap();
    assert_streamed(&path, &raw, "raw");
}

#[test]
fn nobody_there_is_said() {
    headwater(&["jobs", "/nowhere/qmp.sock"]).code(1).says(&["/nowhere/qmp.sock", "No such file"]);
}

/// Also where the name is that of the program's file, and no link says what the program is called otherwise.
#[test]
fn under_its_own_name_the_daemon_goes_to_the_background() {
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_headwater"));
    let scratch = Scratch::new();
    // A hard link stays on the file system.
    let beside = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
    let named = beside.path().join("headwater-storage-daemon");
    std::fs::hard_link(program, &named).unwrap();
    let (pidfile, qmp) = (scratch.path("pid"), scratch.path("qmp"));
    let chardev = format!("socket,id=qmp,path={qmp},server=on,wait=off");
    let done = std::process::Command::new(&named)
        .args(["--daemonize", "--pidfile", &pidfile, "--chardev", &chardev, "--monitor", "qmp"])
        .status()
        .unwrap();
    assert!(done.success(), "{done}");
    Monitor::connect(&qmp).run("quit", &json!({}));
    let start = now();
    while std::path::Path::new(&pidfile).exists() {
        assert!(elapsed(start) < PATIENCE, "it is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}
