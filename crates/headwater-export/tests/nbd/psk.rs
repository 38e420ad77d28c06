//! TLS with a key that both sides have: with the clients that people use, and with clients who have another or none.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::common::{Client, SIZE, Server};
use crate::tools::{run, sample, text};
use headwater_export::nbd::ServerOptions;
use headwater_nbd::ClientAsk;
use headwater_tls::{TlsCredentials, TlsOptions};

const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn write_keys(directory: &Path, users: &[(&str, &str)]) {
    let mut text = String::new();
    for (user, key) in users {
        writeln!(text, "{user}:{key}").unwrap();
    }
    std::fs::write(directory.join("keys.psk"), text).unwrap();
}

/// A server that knows alice and bob, and the directory of their keys.
fn start() -> (Server, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    write_keys(directory.path(), &[("alice", KEY), ("bob", &KEY[..32])]);
    let keys = directory.path().join("keys.psk");
    let tls = Some(TlsCredentials::load(&TlsOptions::PskServer { keys }).unwrap());
    (Server::start_with(ServerOptions { tls, ..ServerOptions::default() }), directory)
}

fn uri(server: &Server, user: &str, export: &str, keys: &Path) -> String {
    format!(
        "nbds+unix://{user}@/{export}?socket={}&tls-psk-file={}/keys.psk",
        server.path("nbd.sock").display(),
        keys.display()
    )
}

/// Arguments for QEMU's tools: credentials, and "disk" with them.
fn qemu(server: &Server, user: &str, keys: &Path) -> [String; 2] {
    [
        format!("tls-creds-psk,id=tls,endpoint=client,username={user},dir={}", keys.display()),
        format!(
            "driver=nbd,server.type=unix,server.path={},export=disk,tls-creds=tls",
            server.path("nbd.sock").display()
        ),
    ]
}

/// The program fails, and by itself: it is told at once.
fn fails(program: &str, arguments: &[&str]) {
    const TIMED_OUT: i32 = 124;
    let output = Command::new("timeout").args(["10", program]).args(arguments).output().unwrap();
    let code = output.status.code().unwrap();
    assert!(code != 0 && code != TIMED_OUT, "{program} {arguments:?} ends with {code}");
}

#[test]
fn libnbds_tools_work_with_a_key() {
    let (server, keys) = start();
    let disk = uri(&server, "alice", "disk", keys.path());
    let info = run("nbdinfo", &[&disk]);
    assert!(info.contains("with TLS") && info.contains(&format!("export-size: {SIZE}")), "{info}");
    let (image, back) = (server.path("image.raw"), server.path("back.raw"));
    let bytes = sample(&image);
    run("nbdcopy", &[text(&image), &disk]);
    let disk = uri(&server, "bob", "disk", keys.path());
    run("nbdcopy", &["--connections=4", "--requests=64", &disk, text(&back)]);
    assert!(std::fs::read(&back).unwrap() == bytes, "nbdcopy reads what it wrote");
}

#[test]
fn qemus_tools_work_with_a_key() {
    let (server, keys) = start();
    let [object, disk] = &qemu(&server, "bob", keys.path());
    let image = server.path("image.raw");
    sample(&image);
    let source = format!("driver=raw,file.driver=file,file.filename={}", image.display());
    run(
        "qemu-img",
        &["convert", "--object", object, "-n", "--image-opts", "--target-image-opts", &source, disk],
    );
    run("qemu-img", &["compare", "--object", object, "--image-opts", &source, disk]);
}

#[test]
fn whoever_has_another_key_or_is_not_known_learns_nothing_and_need_not_wait() {
    let (server, keys) = start();
    let refused = Client::try_negotiate(server.connect(), ClientAsk::new("disk")).unwrap_err();
    assert!(refused.contains("requires TLS"), "{refused}");
    let other = tempfile::tempdir().unwrap();
    write_keys(other.path(), &[("alice", &KEY.replace('f', "e")), ("carol", KEY)]);
    for user in ["alice", "carol"] {
        fails("nbdinfo", &[&uri(&server, user, "disk", other.path())]);
        let [object, disk] = &qemu(&server, user, other.path());
        fails("qemu-img", &["info", "--object", object, "--image-opts", disk]);
    }
    run("nbdinfo", &[&uri(&server, "alice", "disk", keys.path())]);
}
