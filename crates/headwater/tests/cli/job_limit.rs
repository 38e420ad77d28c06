//! What jobs of a daemon share: one limit, by their weights; and the other commands of our own.

use crate::common::monitor::Monitor;
use crate::common::*;
use serde_json::{Value, json};
use std::time::Duration;

const SIZE: u64 = 16 * MIB;

/// A daemon with two overlays, each over a raw image of its own.
struct Two {
    scratch: Scratch,
    running: Running,
}

impl Two {
    fn start(more: &[&str]) -> Self {
        let scratch = Scratch::new();
        let chardev = |id: &str| format!("socket,id={id},path={},server=on,wait=off", scratch.path(id));
        let mut args: Vec<String> =
            ["daemon", "--chardev", &chardev("qmp"), "--monitor", "qmp", "--chardev", &chardev("people")]
                .map(str::to_owned)
                .to_vec();
        args.extend(["--monitor", "people"].map(str::to_owned));
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        for n in [0, 1] {
            let (raw, disk) = (scratch.path(&format!("{n}.raw")), scratch.path(&format!("{n}.qcow2")));
            std::fs::write(&raw, noise(40 + n, SIZE as usize)).unwrap();
            tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw", &disk]);
            args.push("--blockdev".into());
            args.push(format!("driver=qcow2,node-name=disk{n},file.driver=file,file.filename={disk}"));
        }
        let mut running = Running::start(&args);
        running.wait_for_socket(&scratch.path("people"));
        Self { scratch, running }
    }

    fn monitor(&self) -> Monitor {
        Monitor::connect(&self.scratch.path("qmp"))
    }

    fn jobs(&self, args: &[&str]) -> Ended {
        headwater(&[&["jobs", &self.scratch.path("people")], args].concat())
    }
}

/// How far both jobs are.
fn offsets(monitor: &mut Monitor) -> [u64; 2] {
    let jobs = monitor.run("query-block-jobs", &json!({}));
    ["job0", "job1"].map(|id| {
        let mut jobs = jobs.as_array().unwrap().iter();
        jobs.find(|job| job["device"] == id).and_then(|job| job["offset"].as_u64()).unwrap_or(SIZE)
    })
}

fn own_of(monitor: &mut Monitor, id: &str) -> Value {
    let own = monitor.run("headwater-query", &json!({}));
    own["jobs"].as_array().unwrap().iter().find(|job| job["id"] == id).unwrap().clone()
}

#[test]
fn jobs_share_one_limit_by_their_weights() {
    let two = Two::start(&["--job-limit", "2M"]);
    let mut monitor = two.monitor();
    for n in [0, 1] {
        let (id, device) = (format!("job{n}"), format!("disk{n}"));
        monitor.run("block-stream", &json!({"job-id": id, "device": device, "auto-dismiss": false}));
    }
    two.jobs(&["weight", "job1", "300"]).code(0);
    let listed = two.jobs(&[]).code(0).stdout;
    assert!(
        listed.contains(", weight 300") && listed.contains("all jobs together: at most 2 MiB/s"),
        "{listed}"
    );
    let since = now();
    let before = offsets(&mut monitor);
    std::thread::sleep(Duration::from_secs(4));
    let after = offsets(&mut monitor);
    let took = elapsed(since).as_secs_f64();
    let copied = [after[0] - before[0], after[1] - before[1]].map(|bytes| bytes as f64 / took / MIB as f64);
    // A copy of each may be under way at either end.
    assert!((0.3..0.8).contains(&copied[0]) && (1.1..1.9).contains(&copied[1]), "{copied:?} MiB/s");
    assert!(copied[0] + copied[1] < 2.4, "{copied:?} MiB/s");
    two.jobs(&["limit", "0"]).code(0);
    for id in ["job0", "job1"] {
        monitor.wait_for_job(id);
    }
    assert!(!two.jobs(&[]).code(0).stdout.contains("together"));
    two.running.signal("TERM");
    two.running.wait().code(0);
    for n in [0, 1] {
        assert_streamed(
            &two.scratch.path(&format!("{n}.qcow2")),
            &two.scratch.path(&format!("{n}.raw")),
            "raw",
        );
    }
}

#[test]
fn commands_of_our_own_set_and_tell() {
    let state = Scratch::new();
    let two = Two::start(&["--job-limit=1K", "--state-dir", &state.path("jobs")]);
    let mut monitor = two.monitor();
    monitor.run("block-stream", &json!({"job-id": "job0", "device": "disk0"}));
    let own = monitor.run("headwater-query", &json!({}));
    assert_eq!(own["job-limit"], 1024);
    let node = own["nodes"].as_array().unwrap().iter().find(|node| node["node-name"] == "disk0").unwrap();
    let quiet = json!({"node-name": "disk0", "held": 0, "held-in-all": 0, "longest-hold": 0, "retries": 0, "outages": 0, "hold": "0"});
    assert_eq!(*node, quiet);
    let job = own_of(&mut monitor, "job0");
    assert_eq!((&job["weight"], job.get("guest-latency")), (&json!(100), None));
    assert!(job["space-needed"].as_u64().unwrap() > SIZE / 2, "{job}");

    two.jobs(&["guest-latency", "job0", "2ms"]).code(0);
    assert_eq!(own_of(&mut monitor, "job0")["guest-latency"], 2000);
    two.jobs(&["guest-latency", "job0", "default"]).code(0);
    assert_eq!(own_of(&mut monitor, "job0").get("guest-latency"), None);
    for (command, arguments, why) in [
        ("headwater-set-job-weight", json!({"id": "job0", "weight": 0}), "from 1 to 10000"),
        ("headwater-set-job-weight", json!({"id": "none", "weight": 1}), "Job not found"),
        ("headwater-set-guest-latency", json!({"id": "job0", "microseconds": 0}), "from 1 to 60000000"),
        ("headwater-set-job-limit", json!({"rate": "much"}), "rate"),
    ] {
        let refused = monitor.refused(command, &arguments);
        assert!(refused.contains(why), "{command} {arguments}: {refused}");
    }

    // What was set goes on with the job; the limit is the daemon's.
    monitor.run("headwater-set-job-weight", &json!({"id": "job0", "weight": 7}));
    monitor.run("headwater-set-job-limit", &json!({"rate": 2048}));
    assert_eq!(monitor.run("headwater-query", &json!({}))["job-limit"], 2048);
    let record: Value = serde_json::from_slice(&read_file(&state.path("jobs/job0.job"))).unwrap();
    assert_eq!(record["weight"], 7);
    // Nobody waits for a job that waits for its share.
    let since = now();
    two.running.signal("TERM");
    two.running.wait().code(0);
    assert!(elapsed(since) < Duration::from_secs(5));
}
