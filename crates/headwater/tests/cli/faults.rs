//! Sources that can't be reached, are slow, or answer badly: what the client of the export sees of it, what becomes of the job, and what is told.

use crate::common::http::{Fault as Wrong, HttpServer};
use crate::common::monitor::Monitor;
use crate::common::{
    Background, MIB, Running, Scratch, assert_sound, assert_streamed, elapsed, make_raw, nbdsh, now,
    read_file, tool, wait_for_file,
};
use headwater_faults::{Answer, FaultProxy, Link, Outage, Protocol, Rule};
use serde_json::json;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const SIZE: u64 = 24 * MIB;
/// Of an image that lasts for many faults.
const LARGE: u64 = 64 * MIB;

/// A client that reads and writes at random, and knows what every byte must be. It ends when it is told to, or with the first error.
struct Guest {
    child: Child,
    stop: String,
}

impl Guest {
    fn start(scratch: &Scratch, uri: &str, raw: &str) -> Self {
        let stop = scratch.path("stop");
        let script = format!(
            "
import os, random, time
h.connect_uri('{uri}')
model = bytearray(open('{raw}', 'rb').read())
r, n, longest = random.Random(1), 0, 0
while not os.path.exists('{stop}'):
    at, size, begun = r.randrange(len(model) - 9000), r.randrange(1, 9000), time.monotonic()
    if r.random() < 0.3:
        data = r.randbytes(size)
        h.pwrite(data, at)
        model[at:at + size] = data
    else:
        assert h.pread(size, at) == model[at:at + size], f'wrong bytes at {{at}}'
    n, longest = n + 1, max(longest, time.monotonic() - begun)
    # Otherwise it would soon have read all of a small disk, and nothing be asked of the source any more.
    time.sleep(0.05)
for at in range(0, len(model), 1 << 20):
    assert h.pread(1 << 20, at) == model[at:at + (1 << 20)], f'wrong bytes at {{at}}'
open('{raw}', 'wb').write(model)
print(n, longest)
"
        );
        let child = Command::new("/usr/bin/python3")
            .args(["-m", "nbd", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("scripts/setup installs libnbd for Python");
        Self { child, stop }
    }

    /// Ends it: how many requests it made, and how long the longest took. It has seen no error, and no wrong byte; `raw` is what the disk holds.
    #[track_caller]
    fn end(self) -> (u64, f64) {
        std::fs::write(&self.stop, "").unwrap();
        let output = self.child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "the guest saw: {}", String::from_utf8_lossy(&output.stderr));
        let (count, longest) = said.trim().split_once(' ').expect("two numbers");
        (count.parse().unwrap(), longest.parse().unwrap())
    }
}

fn address(server: &HttpServer) -> SocketAddr {
    server.url.trim_start_matches("http://").trim_end_matches("/image").parse().unwrap()
}

/// A web server with an image behind a proxy: the proxy, its URL, and a copy of the image.
fn web(scratch: &Scratch, size: u64) -> (HttpServer, FaultProxy, String, String) {
    let raw = scratch.path("a.raw");
    make_raw(&raw, size, 3);
    let server = HttpServer::start(read_file(&raw), Wrong::None, Duration::ZERO);
    let proxy = FaultProxy::start(address(&server), Protocol::Http).unwrap();
    let url = format!("http://{}/image", proxy.address());
    (server, proxy, url, raw)
}

fn wait(time: u64) {
    std::thread::sleep(Duration::from_millis(time));
}

/// Waits until more of the source has come than now.
#[track_caller]
fn wait_for_bytes(running: &mut Running, proxy: &FaultProxy) {
    let before = proxy.seen().bytes;
    running.wait_until("bytes of the source", |_| proxy.seen().bytes > before + 100_000);
}

#[test]
fn guests_see_no_fault_of_a_web_server_that_may_pass() {
    let scratch = Scratch::new();
    let (_server, proxy, url, raw) = web(&scratch, LARGE);
    let (disk, uri, control) = (scratch.path("a.qcow2"), scratch.uri("disk"), scratch.path("control.sock"));
    let options = ["--rate", "400K", "--timeout", "1", "--retry", "1", "--json", "--control", &control];
    let mut running = Running::start(&[&["stream", &url, &disk, "--serve", &uri][..], &options].concat());
    running.wait_for_socket(&scratch.path("disk.sock"));
    let guest = Guest::start(&scratch, &uri, &raw);
    let link = |latency, jitter| Link {
        latency: Duration::from_millis(latency),
        jitter: Duration::from_millis(jitter),
        ..Link::default()
    };
    let answers = |answer: Answer, one_in| proxy.add(Rule::new(answer).one_in(one_in));
    let status = |code, retry_after| Answer::Status { code, retry_after };
    let faults: [(&str, &dyn Fn()); 11] = [
        ("latency", &|| proxy.set_link(link(40, 40))),
        ("a trickle", &|| proxy.set_link(Link { rate: NonZeroU64::new(200_000), ..Link::default() })),
        ("short connections", &|| proxy.set_link(Link { cut_after: Some(150_000), ..Link::default() })),
        ("bodies that break off", &|| answers(Answer::CutBody(3_000), 1)),
        ("every third answer is 500", &|| answers(status(500, None), 3)),
        ("503", &|| answers(status(503, None), 1)),
        ("429", &|| answers(status(429, Some(1)), 2)),
        ("bodies that stall", &|| answers(Answer::StallBody(100), 1)),
        ("slow bodies", &|| answers(Answer::Trickle(2_000), 3)),
        ("an outage", &|| proxy.begin(Outage::Refused)),
        ("a cable", &|| proxy.begin(Outage::Stalled)),
    ];
    for (name, begin) in faults {
        let faults = proxy.seen().faults;
        begin();
        wait(1500);
        proxy.heal();
        wait_for_bytes(&mut running, &proxy);
        assert!(running.is_alive(), "{name}: {}", running.err());
        eprintln!("{name}: {} faults", proxy.seen().faults - faults);
    }
    tool(env!("CARGO_BIN_EXE_headwater"), &["ctl", &control, "rate", "0"]);
    running.wait_for_status("the end", |status| status["result"] == "completed");
    let (requests, longest) = guest.end();
    eprintln!("{requests} requests, the longest took {longest} s");
    running.signal("TERM");
    // How a stream ends that had completed before it was interrupted.
    let ended = running.wait();
    let last = ended.last_json();
    assert_eq!((&last["result"], &last["held"]), (&json!("completed"), &json!(0)), "{}", ended.stderr);
    assert!(last["held_in_all"].as_u64() > Some(0) && last["outages"].as_u64() > Some(0), "{last}");
    assert!(ended.stderr.contains("copying waits for the source"), "{}", ended.stderr);
    assert!(ended.stdout.contains("\"waits_for\":\"source\""), "{}", ended.stdout);
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn guests_see_no_fault_of_an_nbd_server_that_may_pass() {
    let scratch = Scratch::new();
    let (raw, socket) = (scratch.path("a.raw"), scratch.path("kit.sock"));
    make_raw(&raw, LARGE, 3);
    let copy = scratch.path("copy.raw");
    std::fs::copy(&raw, &copy).unwrap();
    // Not nbdkit: one of several threads that finds its connection lost makes it fail an assertion of its own.
    let args = ["--persistent", "--shared=0", "--read-only", "--format=raw", "--socket", &socket, &copy];
    let _server = Background::start("qemu-nbd", &args);
    wait_for_file(&socket);
    let proxy = FaultProxy::start(PathBuf::from(&socket), Protocol::Plain).unwrap();
    let source = format!("nbd://{}", proxy.address());
    let (disk, uri, control) = (scratch.path("a.qcow2"), scratch.uri("disk"), scratch.path("control.sock"));
    let options = ["--rate", "1M", "--timeout", "1", "--retry", "1", "--json", "--control", &control];
    let mut running = Running::start(&[&["stream", &source, &disk, "--serve", &uri][..], &options].concat());
    running.wait_for_socket(&scratch.path("disk.sock"));
    let guest = Guest::start(&scratch, &uri, &raw);
    let faults: [&dyn Fn(); 4] = [
        &|| proxy.set_link(Link { cut_after: Some(300_000), ..Link::default() }),
        &|| proxy.cut(),
        &|| proxy.begin(Outage::Refused),
        &|| proxy.begin(Outage::Stalled),
    ];
    for begin in faults {
        begin();
        wait(1700);
        proxy.heal();
        wait_for_bytes(&mut running, &proxy);
    }
    tool(env!("CARGO_BIN_EXE_headwater"), &["ctl", &control, "rate", "0"]);
    running.wait_for_status("the end", |status| status["result"] == "completed");
    guest.end();
    running.signal("TERM");
    let last = running.wait().last_json();
    assert_eq!(last["result"], "completed");
    assert!(last["outages"].as_u64() > Some(0), "{last}");
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn what_does_not_pass_is_told_at_once() {
    for (answer, says) in [
        (Answer::Etag("\"two\"".into()), "changed"),
        (Answer::RangeOff(512), "127.0.0.1"),
        (Answer::LengthOff(-7), "127.0.0.1"),
        (Answer::Status { code: 403, retry_after: None }, "403"),
        (Answer::Status { code: 404, retry_after: None }, "404"),
    ] {
        let scratch = Scratch::new();
        let (_server, proxy, url, _raw) = web(&scratch, SIZE);
        let (disk, uri) = (scratch.path("a.qcow2"), scratch.uri("disk"));
        let mut running = Running::start(&[
            "stream",
            &url,
            &disk,
            "--serve",
            &uri,
            "--rate",
            "1M",
            "--json",
            "--exit-when-done",
        ]);
        running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(100_000));
        proxy.add(Rule::new(answer));
        let begun = now();
        let ended = running.wait().code(1).says(&[says]);
        assert!(elapsed(begun) < Duration::from_secs(8), "it took {:?}", elapsed(begun));
        assert!(!ended.stderr.contains("waits for"), "{}", ended.stderr);
        assert_sound(&disk);
    }
}

#[test]
fn the_bounds_that_were_set_hold() {
    let scratch = Scratch::new();
    let (_server, proxy, url, raw) = web(&scratch, SIZE);
    let (disk, uri) = (scratch.path("a.qcow2"), scratch.uri("disk"));
    let bounds = ["--hold", "2", "--wait", "4", "--retry", "0"];
    let mut running = Running::start(
        &[&["stream", &url, &disk, "--serve", &uri, "--rate", "1M", "--json"][..], &bounds].concat(),
    );
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(100_000));
    proxy.begin(Outage::Refused);
    let far = SIZE - MIB;
    let script = format!(
        "
import time
begun = time.monotonic()
try:
    h.pread(4096, {far})
    assert False, 'nothing can have come'
except nbd.Error as error:
    assert error.errnum == 5, error
took = time.monotonic() - begun
assert 1.9 < took < 6, took"
    );
    nbdsh(&uri, &script);
    running.wait_for_status("the failure", |status| status["result"] == "failed");
    // The source comes back: the disk is as good as ever.
    proxy.heal();
    let whole = read_file(&raw);
    let bytes = &whole[far as usize..far as usize + 16];
    let list: Vec<_> = bytes.iter().map(u8::to_string).collect();
    nbdsh(&uri, &format!("assert h.pread(16, {far}) == bytes([{}])", list.join(",")));
    running.signal("TERM");
    running.wait().code(1);
    assert_sound(&disk);
}

#[test]
fn nothing_waits_for_requests_that_are_held() {
    let scratch = Scratch::new();
    let (_server, proxy, url, _raw) = web(&scratch, SIZE);
    let (disk, uri) = (scratch.path("a.qcow2"), scratch.uri("disk"));
    // One end is a client that is killed, the other an interruption; in both the source either refuses or says nothing.
    for outage in [Outage::Refused, Outage::Stalled] {
        let _ = std::fs::remove_file(&disk);
        proxy.heal();
        let mut running = Running::start(&[
            "stream", &url, &disk, "--serve", &uri, "--rate", "1M", "--json", "--hold", "forever",
        ]);
        running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(100_000));
        proxy.begin(outage);
        let client = |n: u64| {
            let script = format!("h.connect_uri('{uri}')\nh.pread(4096, {})", SIZE - n * MIB);
            Background::start("/usr/bin/python3", &["-m", "nbd", "-c", &script])
        };
        let (first, _second) = (client(1), client(2));
        if outage == Outage::Refused {
            running.wait_for_status("two held reads", |status| status["held"] == 2);
            drop(first);
            let told = running.out().lines().count();
            running.wait_until("that one is gone", |running| {
                running.out().lines().skip(told).any(|line| line.contains("\"held\":1,"))
            });
        } else {
            wait(1500);
        }
        let begun = now();
        running.signal("TERM");
        running.wait().code(130);
        assert!(elapsed(begun) < Duration::from_secs(4), "it took {:?}", elapsed(begun));
        assert_sound(&disk);
    }
}

/// The command line of a daemon whose disk is an overlay over `url`.
fn daemon(scratch: &Scratch, url: &str, disk: &str, more: &[&str]) -> (Running, Monitor) {
    let size = SIZE.to_string();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", disk, &size]);
    let blockdev = format!(
        "driver=qcow2,node-name=disk,file.driver=file,file.filename={disk},backing.driver=raw,backing.file.driver=http,backing.file.url={url}"
    );
    let server = format!("addr.type=unix,addr.path={}", scratch.path("disk.sock"));
    let chardev = format!("socket,id=qmp,path={},server=on,wait=off", scratch.path("qmp.sock"));
    let export = "type=nbd,id=export,node-name=disk,name=disk,writable=on";
    let args = [
        "daemon",
        "--blockdev",
        &blockdev,
        "--nbd-server",
        &server,
        "--export",
        export,
        "--chardev",
        &chardev,
        "--monitor",
        "chardev=qmp",
    ];
    let mut running = Running::start(&[&args[..], more].concat());
    let monitor = Monitor::of(&mut running, &scratch.path("qmp.sock"));
    (running, monitor)
}

#[test]
fn a_daemon_that_is_told_to_holds_and_its_jobs_wait() {
    let scratch = Scratch::new();
    let (_server, proxy, url, raw) = web(&scratch, SIZE);
    let (disk, uri) = (scratch.path("a.qcow2"), scratch.uri("disk"));
    let (running, mut monitor) = daemon(&scratch, &url, &disk, &["--hold", "forever"]);
    let guest = Guest::start(&scratch, &uri, &raw);
    wait(300);
    proxy.begin(Outage::Refused);
    wait(500);
    // Held requests keep nobody from changing the graph.
    let overlay = scratch.path("b.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &overlay, &SIZE.to_string()]);
    let over = json!({
        "driver": "qcow2", "node-name": "over", "backing": null,
        "file": {"driver": "file", "filename": overlay},
    });
    let begun = now();
    monitor.run("blockdev-add", &over);
    monitor.run("blockdev-snapshot", &json!({"node": "disk", "overlay": "over"}));
    assert!(elapsed(begun) < Duration::from_secs(3), "it took {:?}", elapsed(begun));
    proxy.heal();
    monitor.run("block-stream", &json!({"job-id": "job", "device": "over", "speed": 2 * MIB}));
    wait(500);
    proxy.begin(Outage::Refused);
    let waiting = monitor.event("HEADWATER_JOB_WAITING").unwrap();
    assert_eq!((&waiting["data"]["id"], &waiting["data"]["reason"]), (&json!("job"), &json!("source")));
    let jobs = monitor.run("query-jobs", &json!({}));
    assert_eq!(
        (&jobs[0]["status"], &jobs[0]["x-waiting-for"]),
        (&json!("paused"), &json!("source")),
        "{jobs}"
    );
    let blocks = monitor.run("query-block-jobs", &json!({}));
    assert_eq!(
        (&blocks[0]["io-status"], &blocks[0]["paused"]),
        (&json!("failed"), &json!(false)),
        "{blocks}"
    );
    proxy.heal();
    monitor.event("HEADWATER_JOB_GOES_ON").unwrap();
    monitor.run("block-job-set-speed", &json!({"device": "job", "speed": 0}));
    monitor.event("BLOCK_JOB_COMPLETED").unwrap();
    guest.end();
    monitor.run("quit", &json!({}));
    running.wait().code(0);
}

#[test]
fn a_daemon_that_is_not_told_to_fails_requests_and_jobs_as_qemus_does() {
    let scratch = Scratch::new();
    let (_server, proxy, url, _raw) = web(&scratch, SIZE);
    let (disk, uri) = (scratch.path("a.qcow2"), scratch.uri("disk"));
    let (running, mut monitor) = daemon(&scratch, &url, &disk, &[]);
    proxy.add(Rule::new(Answer::Status { code: 503, retry_after: Some(600) }));
    // Not at the beginning, which was read when the image was opened.
    let script = format!(
        "try:\n    h.pread(4096, {})\n    assert False\nexcept nbd.Error as error:\n    assert error.errnum == 5",
        SIZE - MIB
    );
    nbdsh(&uri, &script);
    monitor.run("block-stream", &json!({"job-id": "job", "device": "disk"}));
    let failed = monitor.event("BLOCK_JOB_ERROR").unwrap();
    assert_eq!(failed["data"]["action"], "report");
    // A removal has nothing to wait for either.
    monitor.run("block-export-del", &json!({"id": "export", "mode": "hard"}));
    monitor.event("BLOCK_EXPORT_DELETED").unwrap();
    monitor.run("quit", &json!({}));
    running.wait().code(0);
}
