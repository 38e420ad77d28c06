//! Disks that fill up, and traces of boots: what people and machines see of them.

use crate::common::monitor::Monitor;
use crate::common::*;
use serde_json::json;

/// A small file system of memory, which is gone with this.
struct Small(String);

impl Small {
    /// None where it can't be mounted.
    fn mount(scratch: &Scratch, size: &str) -> Option<Self> {
        let path = scratch.path("small");
        std::fs::create_dir(&path).unwrap();
        let mounted = tool_output("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none", &path]);
        if !mounted.status.success() {
            eprintln!("not tried: only root can mount a small filesystem");
            return None;
        }
        Some(Self(path))
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.0)
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&*self.0).unwrap();
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        tool_output("umount", &["-l", &self.0]);
    }
}

#[test]
fn a_stream_waits_before_the_disk_is_full_and_goes_on_when_there_is_room() {
    let scratch = Scratch::new();
    let Some(small) = Small::mount(&scratch, "28M") else { return };
    let (raw, disk, filler) = (scratch.path("source.raw"), small.path("disk.qcow2"), small.path("filler"));
    std::fs::write(&raw, noise(21, 16 << 20)).unwrap();
    std::fs::write(&filler, vec![1; 16 << 20]).unwrap();
    let uri = scratch.uri("disk");
    let args = ["stream", &raw, &disk, "--serve", &uri, "--low-water", "3M", "--json", "--exit-when-done"];
    let mut running = Running::start(&args);
    running.wait_for_status("a wait", |status| {
        let why = status["waiting_for"].as_str().unwrap_or_default();
        status["state"] == "paused" && why.contains("low-water")
    });
    assert!(small.free() >= 3 << 20, "{}", small.free());
    // The guest has what was left for it: neither a write nor a read fails.
    let source = format!("open('{raw}', 'rb').read()");
    let guest = format!(
        "assert h.pread(1 << 20, 14 << 20) == {source}[14 << 20:15 << 20]\nh.pwrite(b'g' * (2 << 20), 12 << 20)\nh.flush()\n\
         assert h.pread(2 << 20, 12 << 20) == b'g' * (2 << 20)"
    );
    nbdsh(&uri, &guest);
    assert!(running.is_alive());
    std::fs::remove_file(&filler).unwrap();
    let ended = running.wait().code(0);
    for told in ["waits for the space", "copying goes on", "needs", "doesn't fit"] {
        assert!(ended.stderr.contains(told), "{told}: {}", ended.stderr);
    }
    assert!(
        ended.stdout.lines().any(|line| line.contains("\"space_needed\"") && line.contains("\"space_free\""))
    );
    let mut content = noise(21, 16 << 20);
    content[12 << 20..14 << 20].fill(b'g');
    std::fs::write(&raw, content).unwrap();
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn a_daemons_stream_tells_that_it_waits_for_room() {
    let scratch = Scratch::new();
    let Some(small) = Small::mount(&scratch, "12M") else { return };
    let (raw, disk, socket) = (scratch.path("base.raw"), small.path("disk.qcow2"), scratch.path("qmp"));
    std::fs::write(&raw, noise(22, 16 << 20)).unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw", &disk]);
    let blockdev = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}");
    let chardev = format!("socket,id=qmp,path={socket},server=on,wait=off");
    let more = ["--low-water", "3M", "--allow-backing", &raw];
    let args = ["daemon", "--blockdev", &blockdev, "--chardev", &chardev, "--monitor", "qmp"];
    let mut running = Running::start(&[&args[..], &more].concat());
    let mut monitor = Monitor::of(&mut running, &socket);
    monitor.run("block-stream", &json!({"job-id": "fill", "device": "disk"}));
    let waits = monitor.event("HEADWATER_JOB_WAITING").unwrap();
    assert_eq!((&waits["data"]["id"], &waits["data"]["reason"]), (&json!("fill"), &json!("space")));
    assert!(small.free() >= 3 << 20, "{}", small.free());
    let jobs = monitor.run("query-jobs", &json!({}));
    assert_eq!((&jobs[0]["status"], &jobs[0]["x-waiting-for"]), (&json!("paused"), &json!("space")));
    tool("mount", &["-o", "remount,size=64M", &small.path("")]);
    assert_eq!(monitor.event("HEADWATER_JOB_GOES_ON").unwrap()["data"]["reason"], "space");
    monitor.event("BLOCK_JOB_COMPLETED").unwrap();
    running.signal("TERM");
    running.wait().code(0);
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn a_boot_is_recorded_and_the_next_stream_begins_with_it() {
    let scratch = Scratch::new();
    let (raw, trace, disk) =
        (scratch.path("source.raw"), scratch.path("boot.trace"), scratch.path("disk.qcow2"));
    std::fs::write(&raw, noise(23, 8 << 20)).unwrap();
    let uri = scratch.uri("disk");
    let mut serving =
        Running::start(&["serve", &raw, "--format", "raw", "--serve", &uri, "--record-boot-trace", &trace]);
    serving.wait_for_socket(&scratch.path("disk.sock"));
    nbdsh(&uri, "h.pread(4096, 6 << 20)\nh.pread(4096, 1 << 20)\nh.pread(8192, 6 << 20)");
    serving.signal("INT");
    serving.wait();
    let text = std::fs::read_to_string(&trace).unwrap();
    let ranges: Vec<&str> = text.lines().skip(1).map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(ranges, ["6291456 4096", "1048576 4096", "6295552 4096"], "{text}");
    headwater(&["stream", &raw, &disk, "--boot-trace", &trace]).code(0);
    assert_streamed(&disk, &raw, "raw");
    std::fs::write(&trace, format!("{text}7 x 9\n")).unwrap();
    let other = scratch.path("other.qcow2");
    headwater(&["stream", &raw, &other, "--boot-trace", &trace]).code(1).says(&["boot.trace", "line 5"]);
    assert!(!std::path::Path::new(&other).exists());
}
