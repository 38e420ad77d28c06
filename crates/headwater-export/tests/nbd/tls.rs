//! TLS: with the clients that people use, and with clients that go about it wrongly.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::{Client, SIZE, Server, in_runtime};
use crate::protocol::eventually;
use crate::tools::{run, sample, text};
use headwater_block::ErrorKind;
use headwater_export::nbd::{NbdServer, ServerOptions};
use headwater_export::{Listen, Removal};
use headwater_nbd::ClientAsk;
use headwater_tls::{Endpoint, TlsCredentials, TlsOptions};

fn make_certificates(directory: &Path) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../headwater-tls/tests/make-certificates");
    run(script, &[text(directory)]);
}

fn credentials(directory: &Path, endpoint: Endpoint, verify_peer: bool) -> TlsCredentials {
    let directory = directory.to_owned();
    TlsCredentials::load(&TlsOptions::X509 { endpoint, directory, verify_peer }).unwrap()
}

/// A server with TLS, and a directory of certificates for its clients.
fn start(verify_peer: bool) -> (Server, tempfile::TempDir) {
    start_with(verify_peer, ServerOptions::default())
}

fn start_with(verify_peer: bool, options: ServerOptions) -> (Server, tempfile::TempDir) {
    let certificates = tempfile::tempdir().unwrap();
    make_certificates(certificates.path());
    let tls = Some(credentials(certificates.path(), Endpoint::Server, verify_peer));
    (Server::start_with(ServerOptions { tls, ..options }), certificates)
}

/// The URI of an export over TLS, as libnbd takes it.
fn uri(server: &Server, export: &str, certificates: &Path) -> String {
    format!(
        "nbds+unix:///{export}?socket={}&tls-certificates={}",
        server.path("nbd.sock").display(),
        certificates.display()
    )
}

/// Arguments for QEMU's tools: credentials, and "disk" with them.
fn qemu(server: &Server, certificates: &Path) -> [String; 2] {
    [
        format!("tls-creds-x509,id=tls,endpoint=client,dir={}", certificates.display()),
        format!(
            "driver=nbd,server.type=unix,server.path={},export=disk,tls-creds=tls,tls-hostname=localhost",
            server.path("nbd.sock").display()
        ),
    ]
}

fn fails(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{program} {arguments:?} succeeds");
    printed
}

#[test]
fn libnbds_tools_work_over_tls() {
    let (server, certificates) = start(true);
    let disk = uri(&server, "disk", certificates.path());
    let info = run("nbdinfo", &[&disk]);
    assert!(info.contains("with TLS") && info.contains(&format!("export-size: {SIZE}")), "{info}");
    let list = run("nbdinfo", &["--list", &uri(&server, "", certificates.path())]);
    assert!(list.contains("export=\"disk\"") && list.contains("export=\"read-only\""), "{list}");
    let (image, back) = (server.path("image.raw"), server.path("back.raw"));
    let bytes = sample(&image);
    run("nbdcopy", &[text(&image), &disk]);
    run("nbdcopy", &["--connections=4", "--requests=64", &disk, text(&back)]);
    assert!(std::fs::read(&back).unwrap() == bytes, "nbdcopy reads what it wrote");
}

#[test]
fn qemus_tools_work_over_tls() {
    let (server, certificates) = start(true);
    let [object, disk] = &qemu(&server, certificates.path());
    let image = server.path("image.raw");
    sample(&image);
    let source = format!("driver=raw,file.driver=file,file.filename={}", image.display());
    run(
        "qemu-img",
        &["convert", "--object", object, "-n", "--image-opts", "--target-image-opts", &source, disk],
    );
    run("qemu-img", &["compare", "--object", object, "--image-opts", &source, disk]);
    let commands =
        ["write -P 0x33 -f 1M 8M", "read -P 0x33 1M 8M", "write -z 2M 64k", "flush", "read -P 0 2M 64k"];
    let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    let printed = run("qemu-io", &[&["--object", object, "--image-opts", disk], &commands[..]].concat());
    assert!(!printed.contains("failed"), "{printed}");
}

#[test]
fn whoever_comes_without_tls_or_with_the_wrong_certificates_learns_nothing() {
    let (server, certificates) = start(true);
    let refused = Client::try_negotiate(server.connect(), ClientAsk::new("disk")).unwrap_err();
    assert!(refused.contains("requires TLS"), "{refused}");
    let plain = fails("nbdinfo", &["--list", &server.uri("")]);
    assert!(!plain.contains("the export disk"), "{plain}");

    let other = tempfile::tempdir().unwrap();
    make_certificates(other.path());
    fails("nbdinfo", &[&uri(&server, "disk", other.path())]);
    let [object, disk] = &qemu(&server, other.path());
    fails("qemu-img", &["info", "--object", object, "--image-opts", disk]);
    // One who knows the right authority, and has no certificate.
    std::fs::copy(certificates.path().join("ca-cert.pem"), other.path().join("ca-cert.pem")).unwrap();
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::remove_file(other.path().join(file)).unwrap();
    }
    let [object, disk] = &qemu(&server, other.path());
    fails("qemu-img", &["info", "--object", object, "--image-opts", disk]);
    let (lenient, certificates) = start(false);
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::remove_file(certificates.path().join(file)).unwrap();
    }
    let [object, disk] = &qemu(&lenient, certificates.path());
    run("qemu-img", &["info", "--object", object, "--image-opts", disk]);
}

#[test]
fn a_server_without_credentials_starts_no_tls() {
    let server = Server::start();
    let certificates = tempfile::tempdir().unwrap();
    make_certificates(certificates.path());
    let [object, disk] = &qemu(&server, certificates.path());
    let words = fails("qemu-img", &["info", "--object", object, "--image-opts", disk]);
    assert!(words.contains("TLS is not configured here"), "{words}");
    let tls = Some(credentials(certificates.path(), Endpoint::Client, true));
    in_runtime(async {
        let listen = Listen::Unix { path: certificates.path().join("nbd.sock") };
        let refused =
            NbdServer::start(listen, ServerOptions { tls, ..ServerOptions::default() }).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "a client's credentials");
    });
    assert!(!certificates.path().join("nbd.sock").exists());
}

/// Up to where TLS begins: what a client sends, and the server's greeting and consent.
fn starting_tls(server: &Server) -> std::os::unix::net::UnixStream {
    let mut stream = server.connect();
    stream.write_all(&[&[0, 0, 0, 3][..], b"IHAVEOPT", &5_u32.to_be_bytes(), &[0; 4]].concat()).unwrap();
    let mut answer = [0; 18 + 20];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[18 + 12..18 + 16], 1_u32.to_be_bytes(), "it consents");
    stream
}

#[test]
fn malformed_clients_of_tls_are_cut_off() {
    // Long enough for a good client on a busy machine.
    let limit = Some(Duration::from_secs(2));
    let (server, certificates) =
        start_with(true, ServerOptions { handshake_limit: limit, ..Default::default() });
    let disk = uri(&server, "disk", certificates.path());
    let go = b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04disk\0\0";
    let record =
        |kind: u8, length: u16, content: &[u8]| [&[kind, 3, 1][..], &length.to_be_bytes(), content].concat();
    for garbage in [
        // The next option in clear, as if nothing were agreed on.
        go.to_vec(),
        vec![0xee; 5000],
        record(22, 16, &[1; 16]),
        record(23, 4, b"data"),
        record(21, 2, &[2, 40]),
        record(22, u16::MAX, &[1; 4000]),
        // Nothing, for ever.
        Vec::new(),
        record(22, 512, &[1, 0, 1, 0]),
    ] {
        let mut stream = starting_tls(&server);
        stream.write_all(&garbage).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(
            !answer.windows(8).any(|bytes| bytes == 0x0003_e889_0455_65a9_u64.to_be_bytes()),
            "an answer in clear"
        );
        assert!(answer.len() < 100, "an alert at most: {answer:?}");
    }
    // Bytes behind STARTTLS, before the consent.
    let mut stream = server.connect();
    stream.write_all(&[&[0, 0, 0, 3][..], b"IHAVEOPT", &5_u32.to_be_bytes(), &[0; 4], go].concat()).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(answer.len(), 18, "the greeting, and the end");
    assert!(run("nbdinfo", &[&disk]).contains("with TLS"), "others are not concerned");
}

/// A client that does something, waits for the file GO, and must find itself disconnected.
const SHELL: &str = r#"
import os, time
h.set_uri_allow_local_file(True)
h.connect_uri(URI)
h.pwrite(b"x" * 4096, 0)
assert h.pread(4096, 0) == b"x" * 4096
open(READY, "w").close()
while not os.path.exists(GO):
    time.sleep(0.01)
try:
    h.pread(512, 0)
    raise AssertionError("still there")
except nbd.Error:
    pass
print("sent away")
"#;

#[test]
fn hard_removal_sends_away_clients_that_use_tls() {
    let (server, certificates) = start(true);
    let (ready, go) = (server.path("ready"), server.path("go"));
    let script = SHELL
        .replace("URI", &format!("{:?}", uri(&server, "disk", certificates.path())))
        .replace("READY", &format!("{ready:?}"))
        .replace("GO", &format!("{go:?}"));
    let client = std::thread::spawn(move || run("nbdsh", &["-c", &script]));
    eventually("the client is ready", || ready.exists());
    server.order(|owner| async move {
        let removed = owner.server().remove("disk", Removal::Hard).unwrap();
        removed.await;
    });
    std::fs::write(&go, b"").unwrap();
    assert!(client.join().unwrap().contains("sent away"));
    assert!(server.probe.ended.load(Ordering::SeqCst) > 0);
}
