//! Ends that don't wait: the daemon's own, and a job's, while an NBD server is away for which its node would wait very long.

use crate::common::monitor::Monitor;
use crate::common::*;
use serde_json::json;
use std::time::Duration;

const SIZE: u64 = 8 * MIB;

/// What ends, ends in this time. The nodes would wait an hour.
const SOON: Duration = Duration::from_secs(12);

/// A daemon with a node `far` behind a server that has gone, and what it was told before that.
struct World {
    scratch: Scratch,
    running: Running,
    monitor: Monitor,
    server: Option<Background>,
}

impl World {
    /// With `top`, an empty overlay, on the far node.
    fn new() -> Self {
        let scratch = Scratch::new();
        let raw = scratch.path("far.raw");
        make_raw(&raw, SIZE, 3);
        let far = scratch.path("far.sock");
        let server = Background::nbdkit(&far, &["file", &raw]);
        let top = scratch.path("top.qcow2");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &top, &SIZE.to_string()]);
        let far = format!(
            "driver=raw,node-name=far,file.driver=nbd,file.server.type=unix,file.server.path={far},file.reconnect-delay=3600"
        );
        let top = format!("driver=qcow2,node-name=top,backing=far,file.driver=file,file.filename={top}");
        let nbd = format!("addr.type=unix,addr.path={}", scratch.path("nbd.sock"));
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", scratch.path("qmp.sock"));
        let mut running = Running::start(&[
            "daemon",
            "--blockdev",
            &far,
            "--blockdev",
            &top,
            "--nbd-server",
            &nbd,
            "--export",
            "nbd,id=export,node-name=top,name=top,writable=on",
            "--chardev",
            &chardev,
            "--monitor",
            "qmp",
        ]);
        let monitor = Monitor::of(&mut running, &scratch.path("qmp.sock"));
        Self { scratch, running, monitor, server: Some(server) }
    }

    fn server_goes(&mut self) {
        self.server = None;
    }

    /// A client's read that waits for the server, and fails when the daemon ends.
    fn client_that_waits(&self) -> Background {
        let script = format!(
            "
h.connect_uri('nbd+unix:///top?socket={}')
try:
    h.pread(4096, {})
    assert False, 'nothing can have come'
except nbd.Error:
    pass",
            self.scratch.path("nbd.sock"),
            SIZE - 2 * MIB
        );
        let client = Background::start("/usr/bin/python3", &["-m", "nbd", "-c", &script]);
        std::thread::sleep(Duration::from_millis(500));
        client
    }

    fn ends_soon(self, begun: std::time::SystemTime) {
        let World { running, scratch, .. } = self;
        running.wait().code(0);
        assert!(elapsed(begun) < SOON, "it took {:?}", elapsed(begun));
        assert_sound(&scratch.path("top.qcow2"));
    }
}

#[test]
fn a_stream_whose_source_is_away_ends_when_it_is_cancelled() {
    let mut world = World::new();
    let monitor = &mut world.monitor;
    monitor.run("block-stream", &json!({"job-id": "job", "device": "top", "speed": MIB}));
    std::thread::sleep(Duration::from_millis(300));
    world.server = None;
    monitor.run("block-job-set-speed", &json!({"device": "job", "speed": 0}));
    std::thread::sleep(Duration::from_millis(500));
    let begun = now();
    monitor.run("block-job-cancel", &json!({"device": "job", "force": true}));
    monitor.event("BLOCK_JOB_CANCELLED").unwrap();
    assert!(elapsed(begun) < SOON, "it took {:?}", elapsed(begun));
    monitor.run("quit", &json!({}));
    world.ends_soon(begun);
}

#[test]
fn quit_ends_a_daemon_whose_client_waits() {
    let mut world = World::new();
    world.server_goes();
    let _client = world.client_that_waits();
    let begun = now();
    world.monitor.run("quit", &json!({}));
    world.ends_soon(begun);
}

#[test]
fn a_signal_ends_a_daemon_with_a_job_and_a_command_that_wait() {
    let mut world = World::new();
    world.monitor.run("block-stream", &json!({"job-id": "job", "device": "top", "speed": MIB}));
    std::thread::sleep(Duration::from_millis(300));
    world.server_goes();
    world.monitor.run("block-job-set-speed", &json!({"device": "job", "speed": 0}));
    let _client = world.client_that_waits();
    // This one holds up all commands that change the graph.
    let server = json!({"type": "unix", "path": world.scratch.path("nowhere.sock")});
    let node = json!({"driver": "nbd", "node-name": "n", "server": server, "open-timeout": 3600});
    world.monitor.send("blockdev-add", &node).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let begun = now();
    world.running.signal("TERM");
    world.ends_soon(begun);
}
