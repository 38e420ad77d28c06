//! Both sides of TLS against each other, with credentials that go together and with such that don't.

use headwater_block::{ErrorKind, Result};
use headwater_tls::{Endpoint, TlsCredentials, TlsOptions};
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const LOCALHOST: Option<&str> = Some("localhost");

fn make(directory: &Path, arguments: &[&str]) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/make-certificates");
    let made = std::process::Command::new(script).arg(directory).args(arguments).status();
    assert!(made.expect("the script runs").success());
}

fn load(directory: &Path, endpoint: Endpoint, verify_peer: bool) -> Result<TlsCredentials> {
    TlsCredentials::load(&TlsOptions::X509 { endpoint, directory: directory.to_owned(), verify_peer })
}

fn both(directory: &Path) -> (TlsCredentials, TlsCredentials) {
    (load(directory, Endpoint::Server, true).unwrap(), load(directory, Endpoint::Client, true).unwrap())
}

/// A session in which each side says something. Gives how the server and the client fared.
async fn talk(
    server: &TlsCredentials,
    client: &TlsCredentials,
    name: Option<&str>,
) -> (Result<(), ErrorKind>, Result<(), ErrorKind>) {
    let (here, there) = tokio::io::duplex(1 << 16);
    let serve = async {
        let mut stream = server.accept(there).await.map_err(|e| e.kind())?;
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.map_err(|_| ErrorKind::Unavailable)?;
        stream.write_all(&word).await.map_err(|_| ErrorKind::Unavailable)?;
        stream.flush().await.map_err(|_| ErrorKind::Unavailable)
    };
    let connect = async {
        let mut stream = client.connect(here, name).await.map_err(|e| e.kind())?;
        stream.write_all(b"word").await.map_err(|_| ErrorKind::Unavailable)?;
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.map_err(|_| ErrorKind::Unavailable)?;
        assert_eq!(&word, b"word");
        Ok(())
    };
    tokio::join!(serve, connect)
}

#[tokio::test]
async fn those_who_have_the_same_authority_understand_each_other() {
    let directory = tempfile::tempdir().unwrap();
    make(directory.path(), &[]);
    let (server, client) = both(directory.path());
    for name in [Some("localhost"), Some("127.0.0.1")] {
        assert_eq!(talk(&server, &client, name).await, (Ok(()), Ok(())), "{name:?}");
    }
    let (served, connected) = talk(&server, &client, Some("elsewhere")).await;
    assert!(served.is_err());
    assert_eq!(connected, Err(ErrorKind::PermissionDenied));
    for name in [Some("no name!"), None] {
        let (_, connected) = talk(&server, &client, name).await;
        assert_eq!(connected, Err(ErrorKind::InvalidInput));
    }
}

#[tokio::test]
async fn another_authority_counts_for_nothing() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make(ours.path(), &[]);
    make(theirs.path(), &[]);
    let (server, client) = both(ours.path());
    let (their_server, their_client) = both(theirs.path());
    for name in [Some("localhost"), Some("elsewhere")] {
        let (_, connected) = talk(&their_server, &client, name).await;
        assert_eq!(connected, Err(ErrorKind::PermissionDenied), "{name:?}");
    }
    let indifferent = load(theirs.path(), Endpoint::Client, false).unwrap();
    let (served, _) = talk(&server, &indifferent, None).await;
    assert_eq!(served, Err(ErrorKind::PermissionDenied), "it is the server who refuses");
    // Who doesn't look takes anyone.
    let careless = load(ours.path(), Endpoint::Client, false).unwrap();
    let open = load(theirs.path(), Endpoint::Server, false).unwrap();
    for name in [Some("elsewhere"), None] {
        assert_eq!(talk(&open, &careless, name).await, (Ok(()), Ok(())));
    }
    assert_eq!(talk(&open, &their_client, LOCALHOST).await, (Ok(()), Ok(())));
}

#[tokio::test]
async fn a_client_needs_a_certificate_only_where_it_is_asked_for_one() {
    let directory = tempfile::tempdir().unwrap();
    make(directory.path(), &[]);
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::remove_file(directory.path().join(file)).unwrap();
    }
    let (server, client) = both(directory.path());
    assert_eq!(talk(&server, &client, LOCALHOST).await.0, Err(ErrorKind::PermissionDenied));
    let open = load(directory.path(), Endpoint::Server, false).unwrap();
    assert_eq!(talk(&open, &client, LOCALHOST).await, (Ok(()), Ok(())));
}

#[tokio::test]
async fn a_certificate_that_was_revoked_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    make(directory.path(), &["revoke-client"]);
    let (server, client) = both(directory.path());
    assert_eq!(talk(&server, &client, Some("localhost")).await.0, Err(ErrorKind::PermissionDenied));
    std::fs::remove_file(directory.path().join("ca-crl.pem")).unwrap();
    let (server, client) = both(directory.path());
    assert_eq!(talk(&server, &client, Some("localhost")).await, (Ok(()), Ok(())));
}

#[tokio::test]
async fn the_certificate_of_the_other_side_is_no_use() {
    let directory = tempfile::tempdir().unwrap();
    make(directory.path(), &[]);
    let (server, client) = both(directory.path());
    let (here, _there) = tokio::io::duplex(64);
    assert_eq!(client.accept(here).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(server.check_endpoint(Endpoint::Client).unwrap_err().kind(), ErrorKind::InvalidInput);
    // A client that poses as the server.
    for (from, to) in [("client-cert.pem", "server-cert.pem"), ("client-key.pem", "server-key.pem")] {
        std::fs::copy(directory.path().join(from), directory.path().join(to)).unwrap();
    }
    let impostor = load(directory.path(), Endpoint::Server, true).unwrap();
    assert_eq!(talk(&impostor, &client, Some("somebody")).await.1, Err(ErrorKind::PermissionDenied));
}

#[test]
fn files_that_are_missing_or_wrong_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = |endpoint| load(directory.path(), endpoint, true).unwrap_err();
    assert_eq!(error(Endpoint::Server).kind(), ErrorKind::NotFound);
    make(directory.path(), &[]);
    for (file, endpoint) in [
        ("server-key.pem", Endpoint::Server),
        ("client-cert.pem", Endpoint::Client),
        ("ca-cert.pem", Endpoint::Client),
    ] {
        let path = directory.path().join(file);
        let good = std::fs::read(&path).unwrap();
        for bad in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "-----BEGIN"] {
            std::fs::write(&path, bad).unwrap();
            assert_eq!(error(endpoint).kind(), ErrorKind::InvalidInput, "{file} {bad}");
        }
        std::fs::remove_file(&path).unwrap();
        let missing = error(endpoint);
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert!(missing.to_string().contains(file), "{missing}");
        std::fs::write(&path, good).unwrap();
    }
    // A key that belongs to another certificate.
    std::fs::copy(directory.path().join("client-key.pem"), directory.path().join("server-key.pem")).unwrap();
    assert_eq!(error(Endpoint::Server).kind(), ErrorKind::InvalidInput);
}
