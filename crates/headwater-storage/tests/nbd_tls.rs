//! The NBD client over TLS, against the servers that people use.

mod support;

use headwater_block::{ErrorKind, Node};
use headwater_storage::nbd::{NbdNode, NbdOptions, Server as Address};
use headwater_tls::{Endpoint, TlsCredentials, TlsOptions};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use support::{Server, pattern, read, run, works_at_once};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn certificates() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../headwater-tls/tests/make-certificates");
    assert!(std::process::Command::new(script).arg(directory.path()).status().unwrap().success());
    directory
}

/// Options with the certificates in a directory.
fn options(certificates: &Path, verify_peer: bool) -> NbdOptions {
    let (endpoint, directory) = (Endpoint::Client, certificates.to_owned());
    let tls = TlsCredentials::load(&TlsOptions::X509 { endpoint, directory, verify_peer }).unwrap();
    NbdOptions { tls: Some(tls), tls_hostname: Some("localhost".to_owned()), ..NbdOptions::default() }
}

async fn open(server: &Server, options: NbdOptions) -> Result<Rc<NbdNode>, ErrorKind> {
    let address = Address::Unix { path: server.socket() };
    NbdNode::open(address, "", options).await.map_err(|error| error.kind())
}

async fn refusal(server: &Server, options: NbdOptions) -> ErrorKind {
    open(server, options).await.err().expect("it is refused")
}

fn qemu_nbd(certificates: &Path, image: &Path) -> Server {
    let object = format!("tls-creds-x509,id=tls,endpoint=server,dir={}", certificates.display());
    Server::qemu_nbd(&["--object", &object, "--tls-creds", "tls", "-f", "raw", image.to_str().unwrap()])
}

#[test]
fn qemu_nbd_is_read_and_written_over_tls() {
    run(async {
        let certificates = certificates();
        let image = certificates.path().join("image.raw");
        std::fs::write(&image, vec![0; 16 << 20]).unwrap();
        let server = qemu_nbd(certificates.path(), &image);
        let node = open(&server, options(certificates.path(), true)).await.unwrap();
        works_at_once(&*node).await;
        node.close().await.unwrap();
        assert!(std::fs::read(&image).unwrap()[4096..][..9 << 20] == pattern(0, 9 << 20)[..]);
    });
}

#[test]
fn nbdkit_is_read_over_tls() {
    run(async {
        let certificates = certificates();
        let directory = format!("--tls-certificates={}", certificates.path().display());
        let server = Server::nbdkit(&["--tls=require", &directory, "--tls-verify-peer", "pattern", "64M"]);
        let node = open(&server, options(certificates.path(), true)).await.unwrap();
        assert!(read(&*node, 12345, 20 << 20).await.unwrap() == pattern(12345, 20 << 20));
        node.close().await.unwrap();
    });
}

#[test]
fn a_host_is_checked_by_its_own_name_unless_another_is_given() {
    run(async {
        let certificates = certificates();
        let directory = format!("--tls-certificates={}", certificates.path().display());
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let port_text = port.to_string();
        let _server = Server::nbdkit(&[
            "--tls=require",
            &directory,
            "-p",
            &port_text,
            "-i",
            "127.0.0.1",
            "pattern",
            "1M",
        ]);
        let open = |host: &str, tls_hostname: Option<&str>| {
            let tls_hostname = tls_hostname.map(str::to_owned);
            let options = NbdOptions { tls_hostname, ..options(certificates.path(), true) };
            let server = Address::Inet { host: host.to_owned(), port, family: Default::default() };
            async move { NbdNode::open(server, "", options).await.map_err(|error| error.kind()).map(|_| ()) }
        };
        assert_eq!(open("localhost", None).await, Ok(()));
        assert_eq!(open("127.0.0.1", None).await, Ok(()));
        assert_eq!(open("127.0.0.2", Some("localhost")).await, Err(ErrorKind::Unavailable), "nobody there");
        assert_eq!(open("127.0.0.1", Some("elsewhere")).await, Err(ErrorKind::PermissionDenied));
    });
}

#[test]
fn whoever_is_not_the_server_is_refused() {
    run(async {
        let (ours, theirs) = (certificates(), certificates());
        let image = ours.path().join("image.raw");
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        let server = qemu_nbd(theirs.path(), &image);
        assert_eq!(refusal(&server, options(ours.path(), true)).await, ErrorKind::PermissionDenied);
        let nameless = NbdOptions { tls_hostname: None, ..options(theirs.path(), true) };
        assert_eq!(refusal(&server, nameless).await, ErrorKind::InvalidInput, "a name is needed");
        let elsewhere = NbdOptions { tls_hostname: Some("elsewhere".into()), ..options(theirs.path(), true) };
        assert_eq!(refusal(&server, elsewhere).await, ErrorKind::PermissionDenied);
        assert_eq!(refusal(&server, NbdOptions::default()).await, ErrorKind::Unsupported, "it requires TLS");
        let careless = NbdOptions { tls_hostname: None, ..options(theirs.path(), false) };
        open(&server, careless).await.unwrap();

        // One that knows the right authority, and whose certificate the server wants and doesn't get.
        for file in ["client-cert.pem", "client-key.pem"] {
            std::fs::remove_file(theirs.path().join(file)).unwrap();
        }
        // In TLS 1.3 the client learns of it only with the first answer that doesn't come.
        let anonymous = refusal(&server, options(theirs.path(), true)).await;
        assert!(
            matches!(anonymous, ErrorKind::PermissionDenied | ErrorKind::Unavailable | ErrorKind::Io),
            "{anonymous:?}"
        );
    });
}

#[test]
fn without_tls_on_the_other_side_nothing_is_done_in_clear() {
    run(async {
        let certificates = certificates();
        let plain = Server::nbdkit(&["--tls=off", "pattern", "1M"]);
        let refused = refusal(&plain, options(certificates.path(), true)).await;
        assert!(matches!(refused, ErrorKind::Unsupported | ErrorKind::PermissionDenied), "{refused:?}");

        // One that consents, and then goes on in clear.
        let path = certificates.path().join("liar.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let liar = tokio::task::spawn_local(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").await.unwrap();
            let mut asked = [0; 4 + 16];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(asked[12..16], 5_u32.to_be_bytes(), "nothing but TLS is asked for");
            let option_reply =
                [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &[0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 0]];
            stream.write_all(&option_reply.concat()).await.unwrap();
            // As an answer to NBD_OPT_GO might look.
            stream.write_all(&[0; 300]).await.unwrap();
            let mut heard = Vec::new();
            let _ = stream.read_to_end(&mut heard).await;
            heard
        });
        let options =
            NbdOptions { connect_timeout: Duration::from_secs(5), ..options(certificates.path(), true) };
        let secret = NbdNode::open(Address::Unix { path }, "secret name", options).await.err().unwrap();
        assert_eq!(secret.kind(), ErrorKind::PermissionDenied, "{secret}");
        let heard = liar.await.unwrap();
        assert!(!heard.windows(6).any(|word| word == b"secret"));
    });
}

#[test]
fn the_credentials_of_a_server_are_no_use() {
    run(async {
        let certificates = certificates();
        let directory = certificates.path().to_owned();
        let endpoint = Endpoint::Server;
        let tls = TlsCredentials::load(&TlsOptions::X509 { endpoint, directory, verify_peer: true }).unwrap();
        let options = NbdOptions { tls: Some(tls), ..NbdOptions::default() };
        let server = Address::Unix { path: "/nowhere".into() };
        let refused = NbdNode::open(server, "", options).await.err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
    });
}
