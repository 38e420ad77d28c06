//! Several sources for one image, and manifests: a source dies, stalls or lies in mid-stream, and clients notice nothing.

use crate::common::http::{Fault, HttpServer};
use crate::common::monitor::Monitor;
use crate::common::*;
use headwater_faults::{Answer, FaultProxy, Link, Outage, Protocol, Rule};
use serde_json::{Value, json};
use std::time::Duration;

/// A proxy before a server of `content`, and the address of the image behind it.
fn far(content: Vec<u8>) -> (HttpServer, FaultProxy, String) {
    let server = HttpServer::start(content, Fault::None, Duration::ZERO);
    let host = server.url.trim_start_matches("http://").trim_end_matches("/image");
    let proxy = FaultProxy::start(host.parse::<std::net::SocketAddr>().unwrap(), Protocol::Http).unwrap();
    let url = format!("http://{}/image", proxy.address());
    (server, proxy, url)
}

fn source(name: &str, size: u64, seed: u64) -> (Scratch, String) {
    let scratch = Scratch::new();
    let raw = scratch.path(name);
    make_raw(&raw, size, seed);
    (scratch, raw)
}

/// What a client reads all the while, in pieces from all over the disk, compared with the file.
fn read_all_over(uri: &str, raw: &str, rounds: u32) {
    let script = format!(
        "data = open({raw:?}, 'rb').read()\n\
         import random\n\
         random.seed(5)\n\
         for n in range({rounds}):\n\
         \x20   length = random.choice([512, 4096, 65536, 300000])\n\
         \x20   at = random.randrange(0, (len(data) - length) // 512) * 512\n\
         \x20   assert h.pread(length, at) == data[at:at + length], at\n"
    );
    nbdsh(uri, &script);
}

fn state_of(status: &Value, name: &str) -> String {
    let all = status["mirrors"]["sources"].as_array().cloned().unwrap_or_default();
    let of = all.iter().find(|source| source["name"] == name);
    of.and_then(|source| source["state"].as_str()).unwrap_or_default().to_owned()
}

#[test]
fn a_source_that_dies_and_one_that_stalls_are_left_and_returned_to() {
    let (scratch, raw) = source("source.raw", 32 * MIB, 71);
    let (_one, first, first_url) = far(read_file(&raw));
    let (_two, second, second_url) = far(read_file(&raw));
    // So the first is the one that is used.
    second.set_link(Link { latency: Duration::from_millis(30), ..Link::default() });
    let (disk, uri) = (scratch.path("disk.qcow2"), scratch.uri("disk"));
    let mut stream = Running::start(&[
        "stream",
        &first_url,
        &disk,
        "--mirror",
        &second_url,
        "--serve",
        &uri,
        "--rate",
        "3M",
        "--exit-when-done",
        "--json",
    ]);
    stream.wait_for_socket(&scratch.path("disk.sock"));
    read_all_over(&uri, &raw, 20);
    first.begin(Outage::Refused);
    read_all_over(&uri, &raw, 40);
    stream.wait_for_status("the first is left", |status| state_of(status, &first_url) == "left");
    first.heal();
    let back = std::cell::Cell::new(false);
    stream.wait_for_status("the first is used again", |status| match state_of(status, &first_url).as_str() {
        "left" => {
            back.set(true);
            false
        }
        state => back.get() && state == "good",
    });
    second.begin(Outage::Stalled);
    read_all_over(&uri, &raw, 40);
    second.heal();
    let ended = stream.wait().code(0);
    assert_eq!(ended.last_json()["result"], "completed");
    assert!(ended.stderr.contains("is used again"), "{}", ended.stderr);
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn a_source_that_lies_is_blamed_and_the_receipt_says_so() {
    let (scratch, raw) = source("source.raw", 12 * MIB + 777 * 512, 72);
    let (_one, liar, liar_url) = far(read_file(&raw));
    let (_two, honest, honest_url) = far(read_file(&raw));
    honest.set_link(Link { latency: Duration::from_millis(20), ..Link::default() });
    let manifest = scratch.path("manifest");
    headwater(&["digest", &raw, "-o", &manifest]).code(0);
    // What is digested is the same, wherever it lies.
    let printed = headwater(&["digest", &honest_url]).code(0).stdout;
    assert_eq!(printed.into_bytes(), read_file(&manifest));
    let (disk, uri) = (scratch.path("disk.qcow2"), scratch.uri("disk"));
    // The first answers are those that find the source.
    liar.add(Rule::new(Answer::Corrupt).skip(8));
    let mut stream = Running::start(&[
        "stream",
        &liar_url,
        &disk,
        "--mirror",
        &honest_url,
        "--verify",
        &manifest,
        "--serve",
        &uri,
        "--rate",
        "4M",
        "--exit-when-done",
        "--json",
    ]);
    stream.wait_for_socket(&scratch.path("disk.sock"));
    read_all_over(&uri, &raw, 60);
    let ended = stream.wait().code(0);
    let last = ended.last_json();
    let receipt = &last["receipt"];
    assert_eq!(receipt["blamed"], json!([liar_url]), "{last}");
    assert_eq!(receipt["verified_from_the_beginning"], true);
    assert_eq!(state_of(&last, &liar_url), "distrusted");
    for part in [
        "receipt for",
        "gave wrong bytes",
        &liar_url,
        "is not used any more",
        "is wrong: the manifest promises",
    ] {
        assert!(ended.stderr.contains(part), "{part}: {}", ended.stderr);
    }
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn a_wrong_byte_without_a_mirror_is_an_error_and_another_manifest_is_refused() {
    let (scratch, raw) = source("source.raw", 4 * MIB, 73);
    let (manifest, other) = (scratch.path("manifest"), scratch.path("other"));
    headwater(&["digest", &raw, "-o", &manifest]).code(0);
    let mut content = read_file(&raw);
    content[3 * MIB as usize + 5] ^= 1;
    let changed = scratch.path("changed.raw");
    std::fs::write(&changed, &content).unwrap();
    headwater(&["digest", &changed, "-o", &other, "--chunk-size", "64K"]).code(0);
    let disk = scratch.path("disk.qcow2");
    headwater(&["stream", &changed, &disk, "--verify", &manifest])
        .code(1)
        .says(&["changed.raw: chunk 12 (262144 bytes at 3145728) is wrong", "the manifest promises"]);
    // It goes on with the same manifest alone.
    headwater(&["stream", &changed, &disk, "--verify", &other]).code(1).says(&["was begun with --verify"]);
    headwater(&["stream", &changed, &disk]).code(1).says(&["was begun with --verify", "none is given now"]);
    std::fs::remove_file(&disk).unwrap();
    std::fs::write(&other, "headwater-manifest 1\nsize 5\n").unwrap();
    headwater(&["stream", &raw, &disk, "--verify", &other]).code(1).says(&["other: line 3"]);
    headwater(&["stream", &raw, &disk, "--verify", &manifest]).code(0);
    assert_streamed(&disk, &raw, "raw");
}

#[test]
fn a_mirror_may_be_out_of_reach_but_not_another_image() {
    let (scratch, raw) = source("source.raw", 4 * MIB, 74);
    let disk = scratch.path("disk.qcow2");
    let gone = "http://127.0.0.1:1/image";
    let server = HttpServer::start(read_file(&raw), Fault::None, Duration::ZERO);
    // Whichever of them it is, as long as one is there.
    headwater(&["stream", gone, &disk, "--mirror", &server.url, "--exit-when-done"]).code(0);
    assert_streamed(&disk, &raw, "raw");
    std::fs::remove_file(&disk).unwrap();
    headwater(&["stream", &server.url, &disk, "--mirror", gone, "--exit-when-done"]).code(0);
    assert_streamed(&disk, &raw, "raw");
    std::fs::remove_file(&disk).unwrap();
    let short = scratch.path("short.raw");
    make_raw(&short, 3 * MIB, 74);
    headwater(&["stream", &server.url, &disk, "--mirror", &short])
        .code(1)
        .says(&["short.raw", "don't hold the same image"]);
    headwater(&["stream", gone, &disk, "--mirror", "http://127.0.0.1:2/x"]).code(1).says(&[
        "all 2 replicas failed",
        gone,
        "127.0.0.1:2",
    ]);
}

#[test]
fn a_daemon_reads_an_image_of_several_replicas_each_verified() {
    let (scratch, raw) = source("source.raw", 4 * MIB, 75);
    let manifest = scratch.path("manifest");
    headwater(&["digest", &raw, "-o", &manifest]).code(0);
    let (_one, _liar, liar_url) = far({
        let mut content = read_file(&raw);
        content[2 * MIB as usize] ^= 1;
        content
    });
    let (_two, _honest, honest_url) = far(read_file(&raw));
    let verified = |url: &str| json!({"driver": "verify", "manifest": manifest, "file": {"driver": "http", "url": url, "read-only": true}});
    let node = json!({"driver": "raw", "node-name": "disk", "read-only": true,
        "file": {"driver": "replicas", "node-name": "both", "children": [verified(&liar_url), verified(&honest_url)]}});
    let (socket, qmp) = (scratch.path("disk.sock"), scratch.path("qmp"));
    let chardev = format!("socket,id=qmp,path={qmp},server=on,wait=off");
    let mut daemon = Running::start(&[
        "daemon",
        "--blockdev",
        &node.to_string(),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={socket}"),
        "--export",
        "type=nbd,id=e,node-name=disk,name=disk",
        "--chardev",
        &chardev,
        "--monitor",
        "qmp",
    ]);
    daemon.wait_for_socket(&socket);
    read_all_over(&scratch.uri("disk"), &raw, 60);
    let mut monitor = Monitor::connect(&qmp);
    let nodes = monitor.run("query-named-block-nodes", &json!({}));
    let drivers: Vec<_> = nodes.as_array().unwrap().iter().map(|node| node["drv"].clone()).collect();
    for driver in ["replicas", "verify", "http", "raw"] {
        assert!(drivers.contains(&json!(driver)), "{drivers:?}");
    }
    monitor.run("quit", &json!({}));
    daemon.wait().code(0);
}
