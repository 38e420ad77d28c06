//! For how long clients' requests are held, and jobs wait, where the operator has said so of single nodes and jobs.

use crate::common::http::{Fault as Wrong, HttpServer};
use crate::common::monitor::Monitor;
use crate::common::*;
use headwater_faults::{FaultProxy, Outage, Protocol};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;

const SIZE: u64 = 8 * MIB;

fn hold_of(monitor: &mut Monitor, node: &str) -> String {
    let own = monitor.run("headwater-query", &json!({}));
    let node = own["nodes"].as_array().unwrap().iter().find(|known| known["node-name"] == node).unwrap();
    node["hold"].as_str().unwrap().to_owned()
}

#[test]
fn a_source_says_for_how_long_and_a_disk_may_say_otherwise() {
    let scratch = Scratch::new();
    let raw = scratch.path("a.raw");
    make_raw(&raw, SIZE, 3);
    let server = HttpServer::start(read_file(&raw), Wrong::None, Duration::ZERO);
    let address: SocketAddr =
        server.url.trim_start_matches("http://").trim_end_matches("/image").parse().unwrap();
    let proxy = FaultProxy::start(address, Protocol::Http).unwrap();
    let source = format!(
        "driver=raw,node-name=golden,read-only=on,file.driver=http,file.node-name=far,file.x-headwater-hold=forever,file.url=http://{}/image",
        proxy.address()
    );
    let overlay = |name: &str, more: &str| {
        let path = scratch.path(&format!("{name}.qcow2"));
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, &SIZE.to_string()]);
        format!("driver=qcow2,node-name={name},backing=golden,file.driver=file,file.filename={path}{more}")
    };
    let (one, other) = (overlay("one", ""), overlay("other", ",x-headwater-hold=1"));
    let nbd = format!("addr.type=unix,addr.path={}", scratch.path("nbd.sock"));
    let chardev = format!("socket,id=qmp,path={},server=on,wait=off", scratch.path("qmp.sock"));
    let mut args = vec!["daemon", "--blockdev", &source, "--blockdev", &one, "--blockdev", &other];
    args.extend(["--nbd-server", &nbd, "--export", "nbd,id=e1,node-name=one,name=one"]);
    args.extend(["--export", "nbd,id=e2,node-name=other,name=other"]);
    args.extend(["--chardev", &chardev, "--monitor", "qmp"]);
    let mut running = Running::start(&args);
    let mut monitor = Monitor::of(&mut running, &scratch.path("qmp.sock"));
    for (node, hold) in [("far", "forever"), ("golden", "forever"), ("one", "forever"), ("other", "1")] {
        assert_eq!(hold_of(&mut monitor, node), hold, "{node}");
    }

    proxy.begin(Outage::Refused);
    let socket = scratch.path("nbd.sock");
    let failing = |disk: &str| {
        format!(
            "
h.connect_uri('nbd+unix:///{disk}?socket={socket}')
try:
    h.pread(4096, {})
    assert False, 'nothing can have come'
except nbd.Error as error:
    assert error.errnum == 5, error",
            SIZE - MIB
        )
    };
    // The one that says so itself fails after its second, while the other is held.
    let held = Background::start("/usr/bin/python3", &["-m", "nbd", "-c", &failing("one")]);
    tool("/usr/bin/python3", &["-m", "nbd", "-c", &failing("other")]);
    let own = monitor.run("headwater-query", &json!({}));
    let held_now = |own: &Value| {
        let nodes = own["nodes"].as_array().unwrap();
        nodes.iter().find(|node| node["node-name"] == "one").unwrap()["held"].as_u64()
    };
    assert_eq!(held_now(&own), Some(1), "{own}");
    // What is said nearer to the disk counts before what its source says; and for a request that is held already.
    monitor.run("headwater-set-hold", &json!({"node-name": "golden", "hold": "0"}));
    assert_eq!(hold_of(&mut monitor, "one"), "0");
    running.wait_until("the end of the held read", |_| {
        held_now(&monitor.run("headwater-query", &json!({}))) == Some(0)
    });
    drop(held);
    monitor.run("headwater-set-hold", &json!({"node-name": "golden"}));
    assert_eq!(hold_of(&mut monitor, "one"), "forever");

    // A job begins with what its disk has, and may be told otherwise while it waits.
    monitor.run("block-stream", &json!({"job-id": "job", "device": "one"}));
    monitor.event("HEADWATER_JOB_WAITING").unwrap();
    let own = monitor.run("headwater-query", &json!({}));
    assert_eq!(own["jobs"][0]["hold"], "forever");
    monitor.run("headwater-set-job-hold", &json!({"id": "job", "hold": "0"}));
    let ended = monitor.event("BLOCK_JOB_COMPLETED").unwrap();
    assert!(ended["data"]["error"].is_string(), "{ended}");

    let never = monitor.refused("headwater-set-hold", &json!({"node-name": "one", "hold": "never"}));
    assert!(never.contains("a number of seconds, or 'forever'"), "{never}");
    let wrong = json!({"driver": "null-co", "node-name": "n", "x-headwater-hold": "-1"});
    assert!(monitor.refused("blockdev-add", &wrong).contains("x-headwater-hold"));
    // A definition that leaves it out takes it back, as any option.
    let file = json!({"driver": "file", "filename": scratch.path("other.qcow2")});
    let other = json!({"driver": "qcow2", "node-name": "other", "backing": "golden", "file": file});
    monitor.run("blockdev-reopen", &json!({"options": [other]}));
    assert_eq!(hold_of(&mut monitor, "other"), "forever");
    running.signal("TERM");
    running.wait().code(0);
}
