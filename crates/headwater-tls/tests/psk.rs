//! Both sides of TLS with a key of both, against each other and against those who have none.

use headwater_block::{ErrorKind, Result};
use headwater_tls::{TlsCredentials, TlsOptions, TlsStream};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const ALICE: &str = "alice:11223344556677889900aabbccddeeff11223344556677889900aabbccddeeff\n";
const BOB: &str = "bob:ffeeddccbbaa00998877665544332211\n";

fn keys(directory: &Path, lines: &[&str]) -> PathBuf {
    let path = directory.join("keys.psk");
    std::fs::write(&path, lines.concat()).unwrap();
    path
}

fn server(keys: &Path) -> Result<TlsCredentials> {
    TlsCredentials::load(&TlsOptions::PskServer { keys: keys.to_owned() })
}

fn client(keys: &Path, user: &str) -> Result<TlsCredentials> {
    TlsCredentials::load(&TlsOptions::PskClient { keys: keys.to_owned(), user: user.to_owned() })
}

async fn echo<S: AsyncRead + AsyncWrite + Unpin>(mut stream: TlsStream<S>) -> Result<(), ErrorKind> {
    let mut bytes = vec![0; 10_000];
    loop {
        match stream.read(&mut bytes).await {
            Ok(0) => return stream.shutdown().await.map_err(|_| ErrorKind::Unavailable),
            Ok(n) => stream.write_all(&bytes[..n]).await.map_err(|_| ErrorKind::Unavailable)?,
            Err(_) => return Err(ErrorKind::Unavailable),
        }
        stream.flush().await.map_err(|_| ErrorKind::Unavailable)?;
    }
}

/// A session in which `length` bytes go there and back through a pipe of `room` bytes. Gives how the server and the client fared.
async fn talk(
    server: &TlsCredentials,
    client: &TlsCredentials,
    length: usize,
    room: usize,
) -> (Result<(), ErrorKind>, Result<(), ErrorKind>) {
    let (here, there) = tokio::io::duplex(room);
    let serve = async { echo(server.accept(there).await.map_err(|e| e.kind())?).await };
    let connect = async {
        let stream = client.connect(here, None).await.map_err(|e| e.kind())?;
        let (mut input, mut output) = tokio::io::split(stream);
        let data: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
        let mut back = Vec::new();
        let send = async {
            output.write_all(&data).await.unwrap();
            output.shutdown().await.unwrap();
        };
        let (read, ()) = tokio::join!(input.read_to_end(&mut back), send);
        read.map_err(|_| ErrorKind::Unavailable)?;
        assert!(back == data, "{length} bytes through {room}");
        Ok(())
    };
    tokio::join!(serve, connect)
}

#[tokio::test]
async fn those_who_have_the_same_key_understand_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let keys = keys(directory.path(), &[ALICE, BOB]);
    let server = server(&keys).unwrap();
    for (user, length, room) in
        [("alice", 4, 1 << 16), ("bob", 0, 64), ("alice", 3_000_000, 1 << 20), ("bob", 200_000, 1000)]
    {
        let client = client(&keys, user).unwrap();
        assert_eq!(talk(&server, &client, length, room).await, (Ok(()), Ok(())), "{user}");
    }
}

#[tokio::test]
async fn another_key_another_user_and_none_at_all_are_refused_at_once() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mixed = ALICE.replace("112233", "112234");
    let (ours, theirs) = (keys(ours.path(), &[ALICE]), keys(theirs.path(), &[&mixed, BOB]));
    for user in ["alice", "bob"] {
        let (server, client) = (server(&ours).unwrap(), client(&theirs, user).unwrap());
        let soon = tokio::time::timeout(Duration::from_secs(5), talk(&server, &client, 4, 1 << 16));
        let (served, connected) = soon.await.expect("an error waits for nothing");
        assert_eq!(served, Err(ErrorKind::PermissionDenied), "{user}");
        assert_eq!(connected, Err(ErrorKind::PermissionDenied), "{user}");
    }
    let empty = tempfile::NamedTempFile::new().unwrap();
    let nobody = server(empty.path()).unwrap();
    let (served, _) = talk(&nobody, &client(&ours, "alice").unwrap(), 4, 1 << 16).await;
    assert_eq!(served, Err(ErrorKind::PermissionDenied));
}

#[tokio::test]
async fn certificates_and_keys_do_not_go_together() {
    let directory = tempfile::tempdir().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/make-certificates");
    assert!(std::process::Command::new(script).arg(directory.path()).status().unwrap().success());
    let x509 = |endpoint| {
        let directory = directory.path().to_owned();
        TlsCredentials::load(&TlsOptions::X509 { endpoint, directory, verify_peer: false }).unwrap()
    };
    let keys = keys(directory.path(), &[ALICE]);
    let (served, connected) =
        talk(&x509(headwater_tls::Endpoint::Server), &client(&keys, "alice").unwrap(), 4, 1 << 16).await;
    assert!(served.is_err() && connected == Err(ErrorKind::PermissionDenied), "{served:?} {connected:?}");
    let (here, there) = tokio::io::duplex(1 << 16);
    let (server, client) = (server(&keys).unwrap(), x509(headwater_tls::Endpoint::Client));
    let (served, connected) = tokio::join!(server.accept(there), client.connect(here, Some("localhost")));
    assert_eq!(served.unwrap_err().kind(), ErrorKind::PermissionDenied);
    assert!(connected.is_err());
}

/// A writer that is dropped while it waits, and another one with something else: what the first had been told is taken is sent, once.
#[tokio::test]
async fn writers_may_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let keys = keys(directory.path(), &[ALICE]);
    let (server, client) = (server(&keys).unwrap(), client(&keys, "alice").unwrap());
    let (here, there) = tokio::io::duplex(5000);
    let (mut writer, mut reader) =
        tokio::try_join!(server.accept(there), client.connect(here, None)).unwrap();
    let mut expected = Vec::new();
    for byte in 0..6 {
        let block = vec![byte; 40_000];
        let written = tokio::select! {
            biased;
            written = writer.write(&block) => written.unwrap(),
            () = tokio::task::yield_now() => 0,
        };
        expected.extend_from_slice(&block[..written]);
    }
    assert!(!expected.is_empty());
    let end = async {
        writer.shutdown().await.unwrap();
        writer
    };
    let mut received = Vec::new();
    let (read, _writer) = tokio::join!(reader.read_to_end(&mut received), end);
    read.unwrap();
    assert!(received == expected, "{} bytes for {}", received.len(), expected.len());
}

#[tokio::test]
async fn an_end_without_a_goodbye_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let keys = keys(directory.path(), &[ALICE]);
    let (server, client) = (server(&keys).unwrap(), client(&keys, "alice").unwrap());
    let (here, there) = tokio::io::duplex(5000);
    let (mut writer, mut reader) =
        tokio::try_join!(server.accept(there), client.connect(here, None)).unwrap();
    writer.write_all(b"half").await.unwrap();
    writer.flush().await.unwrap();
    drop(writer);
    let mut received = Vec::new();
    let error = reader.read_to_end(&mut received).await.unwrap_err();
    assert_eq!((error.kind(), &received[..]), (std::io::ErrorKind::UnexpectedEof, &b"half"[..]));
    assert!(reader.write_all(&[0; 100_000]).await.is_err(), "nobody is there");
}

#[test]
fn files_and_users_that_are_missing_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("keys.psk");
    for error in [server(&missing).unwrap_err(), client(&missing, "alice").unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("keys.psk"), "{error}");
    }
    let keys = keys(directory.path(), &[ALICE, "carol\n"]);
    for error in [server(&keys).unwrap_err(), client(&keys, "alice").unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("keys.psk:2"), "{error}");
    }
    std::fs::write(&keys, ALICE).unwrap();
    let error = client(&keys, "dave").unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("dave"), "{error}");
}
