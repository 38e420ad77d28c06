//! Many disks from one source: it is asked once for what they all need.

use crate::common::http::{Fault, HttpServer};
use crate::common::monitor::Monitor;
use crate::common::*;
use serde_json::json;
use std::time::Duration;

const SIZE: u64 = 16 * MIB;
const DISKS: usize = 10;

/// A daemon with ten overlays whose backing is behind `url`, and NBD exports of them.
struct Ten {
    scratch: Scratch,
    running: Running,
    raw: String,
}

impl Ten {
    /// All overlays on one backing node, or each on a node of its own.
    fn start(content: &[u8], url: &str, one_node: bool, more: &[&str]) -> Self {
        let scratch = Scratch::new();
        let raw = scratch.path("content.raw");
        std::fs::write(&raw, content).unwrap();
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", scratch.path("qmp"));
        let nbd = format!("addr.type=unix,addr.path={}", scratch.path("nbd"));
        let golden = format!("driver=raw,node-name=golden,read-only=on,file.driver=http,file.url={url}");
        let mut args: Vec<String> =
            ["daemon", "--chardev", &chardev, "--monitor", "qmp", "--nbd-server", &nbd]
                .map(str::to_owned)
                .to_vec();
        if one_node {
            args.extend(["--blockdev".to_owned(), golden]);
        }
        for n in 0..DISKS {
            let path = scratch.path(&format!("disk{n}.qcow2"));
            tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, &SIZE.to_string()]);
            let backing = match one_node {
                true => "backing=golden".to_owned(),
                false => format!("backing.driver=raw,backing.file.driver=http,backing.file.url={url}"),
            };
            args.push("--blockdev".into());
            args.push(format!(
                "driver=qcow2,node-name=disk{n},file.driver=file,file.filename={path},{backing}"
            ));
            args.push("--export".into());
            args.push(format!("nbd,id=export{n},node-name=disk{n},name=disk{n},writable=on"));
        }
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let mut running = Running::start(&args);
        running.wait_for_socket(&scratch.path("qmp"));
        Self { scratch, running, raw }
    }

    /// Streams all disks, each begun `apart` after the one before, while guests read two of them; then ends.
    fn stream(self, apart: Duration) {
        let mut monitor = Monitor::connect(&self.scratch.path("qmp"));
        // Answered when all exports are there.
        monitor.run("query-block-exports", &json!({}));
        let guests: Vec<_> = [3, 7]
            .map(|n| {
                let uri = format!("nbd+unix:///disk{n}?socket={}", self.scratch.path("nbd"));
                let raw = self.raw.clone();
                std::thread::spawn(move || {
                    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &raw])
                })
            })
            .into_iter()
            .collect();
        for n in 0..DISKS {
            monitor.run("block-stream", &json!({"job-id": format!("job{n}"), "device": format!("disk{n}")}));
            std::thread::sleep(apart);
        }
        while monitor.run("query-jobs", &json!({})) != json!([]) {
            std::thread::sleep(Duration::from_millis(20));
        }
        for guest in guests {
            guest.join().expect("a guest sees the source's bytes");
        }
        self.running.signal("TERM");
        self.running.wait().code(0);
        for n in [0, 3, 9] {
            assert_streamed(&self.scratch.path(&format!("disk{n}.qcow2")), &self.raw, "raw");
        }
    }
}

#[test]
fn ten_disks_from_one_source_cost_one_download() {
    let content = noise(11, SIZE as usize);
    let server = HttpServer::start(content.clone(), Fault::None, Duration::from_millis(20));
    Ten::start(&content, &server.url, true, &[]).stream(Duration::from_millis(60));
    let sent = server.sent();
    assert!((SIZE..=SIZE / 10 * 11).contains(&sent), "{sent} bytes for an image of {SIZE}");
}

#[test]
fn nodes_with_one_address_and_one_etag_share_as_well() {
    let content = noise(12, SIZE as usize);
    let server = HttpServer::start(content.clone(), Fault::None, Duration::from_millis(20));
    Ten::start(&content, &server.url, false, &[]).stream(Duration::from_millis(30));
    let sent = server.sent();
    assert!((SIZE..=SIZE / 10 * 11).contains(&sent), "{sent} bytes for an image of {SIZE}");
}

#[test]
fn a_directory_spares_the_next_disk_the_download() {
    let scratch = Scratch::new();
    let content = noise(13, 4 << 20);
    let (raw, cache) = (scratch.path("content.raw"), scratch.path("cache"));
    std::fs::write(&raw, &content).unwrap();
    let server = HttpServer::start(content, Fault::ChangesEtag, Duration::ZERO);
    let stream = |disk: &str| {
        headwater(&["stream", &server.url, disk, "--cache-dir", &cache]).code(0);
        assert_streamed(disk, &raw, "raw");
    };
    stream(&scratch.path("one.qcow2"));
    let first = server.sent();
    stream(&scratch.path("two.qcow2"));
    let second = server.sent() - first;
    assert!(first >= 4 << 20 && second <= 512 << 10, "{first} bytes, and then {second}");
    // Another object is fetched.
    server.turn();
    stream(&scratch.path("three.qcow2"));
    assert!(server.sent() - first - second >= 4 << 20);
    // What has no mark can't be kept.
    let socket = scratch.path("nbd");
    let _nbdkit = Background::nbdkit(&socket, &["memory", "size=1M"]);
    let source = format!("nbd+unix:///?socket={socket}");
    let disk = scratch.path("four.qcow2");
    headwater(&["stream", &source, &disk, "--cache-dir", &cache]).code(1).says(&["--cache-dir", "ETag"]);
}

#[test]
fn a_daemon_keeps_in_its_directory_what_its_next_life_reads() {
    let content = noise(14, SIZE as usize);
    let server = HttpServer::start(content.clone(), Fault::None, Duration::ZERO);
    let scratch = Scratch::new();
    let cache = scratch.path("cache");
    let more = ["--cache-dir", &cache, "--share-memory", "0"];
    Ten::start(&content, &server.url, true, &more).stream(Duration::from_millis(100));
    let first = server.sent();
    assert!(first <= SIZE / 10 * 11, "{first} bytes for an image of {SIZE}, without memory");
    Ten::start(&content, &server.url, false, &more).stream(Duration::ZERO);
    let second = server.sent() - first;
    assert!(second <= SIZE / 10, "{second} bytes again");
}
