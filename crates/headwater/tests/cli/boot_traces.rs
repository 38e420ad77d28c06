//! Boot traces over QMP, in the sandbox: recorded of a node, and followed by a stream, also by one that goes on in another daemon.

use crate::common::monitor::Monitor;
use crate::common::*;
use serde_json::{Value, json};
use std::path::Path;

const SIZE: u64 = 16 * MIB;

/// A daemon with an export of an overlay over a raw image, and a monitor for a program beside the one for people.
fn start(scratch: &Scratch, disk: &str) -> (Running, Monitor) {
    let blockdev = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}");
    let chardev = |id: &str| format!("socket,id={id},path={},server=on,wait=off", scratch.path(id));
    let (qmp, people) = (chardev("qmp"), chardev("people"));
    let nbd = format!("addr.type=unix,addr.path={}", scratch.path("disk.sock"));
    let state = scratch.path("state");
    let mut args = vec!["daemon", "--blockdev", &blockdev, "--nbd-server", &nbd];
    args.extend(["--export", "nbd,id=e,node-name=disk,name=disk", "--state-dir", &state]);
    args.extend(["--chardev", &qmp, "--monitor", "qmp", "--chardev", &people, "--monitor", "people"]);
    let mut running = Running::start(&args);
    let monitor = Monitor::of(&mut running, &scratch.path("qmp"));
    (running, monitor)
}

fn overlay(scratch: &Scratch, name: &str) -> String {
    let disk = scratch.path(name);
    let _ = std::fs::remove_file(&disk);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &disk]);
    disk
}

/// The ranges that the overlay itself holds.
fn copied(disk: &str) -> Vec<(u64, u64)> {
    let map = tool("qemu-img", &["map", "-U", "--output=json", disk]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let own = map.as_array().unwrap().iter().filter(|extent| extent["depth"] == 0);
    own.map(|extent| (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap())).collect()
}

#[test]
fn what_one_guest_read_first_is_streamed_first_for_the_next() {
    let scratch = Scratch::new();
    let (raw, trace) = (scratch.path("base.raw"), scratch.path("boot.trace"));
    std::fs::write(&raw, noise(5, SIZE as usize)).unwrap();
    let disk = overlay(&scratch, "disk.qcow2");
    let (running, mut monitor) = start(&scratch, &disk);
    let record = json!({"node-name": "disk", "file": trace});
    monitor.run("headwater-record-boot-trace", &record);
    let own = monitor.run("headwater-query", &json!({}));
    let mut nodes = own["nodes"].as_array().unwrap().iter();
    assert!(nodes.any(|node| node["records-boot-trace"] == json!(trace)), "{own}");
    let uri = scratch.uri("disk");
    nbdsh(&uri, &format!("h.pread(2 << 20, {})\nh.pread(65536, {})", 12 * MIB, 8 * MIB));
    monitor.run("headwater-record-boot-trace", &json!({"node-name": "disk"}));
    let text = String::from_utf8(read_file(&trace)).unwrap();
    let lines: Vec<_> = text.lines().skip(1).map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(lines, [format!("{} {}", 12 * MIB, 2 * MIB), format!("{} 65536", 8 * MIB)], "{text}");
    // Nothing is left beside it; and a recording that is under way ends with the daemon.
    let beside = std::fs::read_dir(Path::new(&trace).parent().unwrap()).unwrap();
    let left: Vec<_> = beside.map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().ends_with(".new")), "{left:?}");
    let people = scratch.path("people");
    headwater(&["jobs", &people, "record-boot-trace", "disk", &scratch.path("second.trace")]).code(0);
    nbdsh(&uri, "h.pread(4096, 0)");
    running.signal("TERM");
    running.wait().code(0);
    assert!(read_file(&scratch.path("second.trace")).ends_with(b" 0 4096\n"));

    // The next machine. The daemon is killed before the job could copy more than its first piece.
    let disk = overlay(&scratch, "disk.qcow2");
    let (running, mut monitor) = start(&scratch, &disk);
    let no_trace = json!({"job-id": "fill", "device": "disk", "x-headwater-boot-trace": raw});
    assert!(monitor.refused("block-stream", &no_trace).contains("boot trace"));
    headwater(&["jobs", &people, "stream", "disk", "--id", "fill", "--rate", "1", "--boot-trace", &trace])
        .code(0);
    running.kill();
    let record: Value = serde_json::from_slice(&read_file(&scratch.path("state/fill.job"))).unwrap();
    assert_eq!(record["boot-trace"].as_str(), Some(text.as_str()));
    // The file is of no matter any more.
    std::fs::remove_file(&trace).unwrap();
    let (running, mut monitor) = start(&scratch, &disk);
    monitor.run("block-job-set-speed", &json!({"device": "fill", "speed": MIB}));
    let mut offset = 0;
    while offset < 2 * MIB {
        let jobs = monitor.run("query-block-jobs", &json!({}));
        offset = jobs[0]["offset"].as_u64().expect("the job");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // In order, so that the disk's tables are written.
    running.signal("TERM");
    running.wait().code(0);
    let copied = copied(&disk);
    let holds = |at: u64| copied.iter().any(|(start, len)| (*start..start + len).contains(&at));
    assert!(holds(12 * MIB) && holds(14 * MIB - 1), "{copied:?}");
    assert!(!holds(4 * MIB) && !holds(15 * MIB), "{copied:?}");
    let (running, mut monitor) = start(&scratch, &disk);
    monitor.run("block-job-set-speed", &json!({"device": "fill", "speed": 0}));
    monitor.event("BLOCK_JOB_COMPLETED").unwrap();
    running.signal("TERM");
    running.wait().code(0);
    assert_streamed(&disk, &raw, "raw");
}
