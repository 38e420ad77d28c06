//! The NBD client over TLS with a key that both sides have, against the servers that people use.

mod support;

use headwater_block::{Error, ErrorKind, Node};
use headwater_storage::nbd::{NbdNode, NbdOptions, Server as Address};
use headwater_tls::{TlsCredentials, TlsOptions};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use support::{Server, pattern, read, run, works_at_once};

const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn keys(directory: &Path, lines: &[(&str, &str)]) -> PathBuf {
    let path = directory.join("keys.psk");
    let text: String = lines.iter().map(|(user, key)| format!("{user}:{key}\n")).collect();
    std::fs::write(&path, text).unwrap();
    path
}

async fn open(server: &Server, keys: &Path, user: &str) -> Result<Rc<NbdNode>, Error> {
    let options = TlsOptions::PskClient { keys: keys.to_owned(), user: user.to_owned() };
    let tls = Some(TlsCredentials::load(&options).unwrap());
    let address = Address::Unix { path: server.socket() };
    NbdNode::open(address, "", NbdOptions { tls, ..NbdOptions::default() }).await
}

fn qemu_nbd(keys: &Path, image: &Path) -> Server {
    let object = format!("tls-creds-psk,id=tls,endpoint=server,dir={}", keys.parent().unwrap().display());
    Server::qemu_nbd(&["--object", &object, "--tls-creds", "tls", "-f", "raw", image.to_str().unwrap()])
}

#[test]
fn qemu_nbd_is_read_and_written_with_a_key() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let keys = keys(directory.path(), &[("alice", KEY), ("bob", &KEY[..32])]);
        let image = directory.path().join("image.raw");
        std::fs::write(&image, vec![0; 16 << 20]).unwrap();
        let server = qemu_nbd(&keys, &image);
        let node = open(&server, &keys, "bob").await.unwrap();
        works_at_once(&*node).await;
        node.close().await.unwrap();
        assert!(std::fs::read(&image).unwrap()[4096..][..9 << 20] == pattern(0, 9 << 20)[..]);
    });
}

#[test]
fn nbdkit_is_read_with_a_key_that_a_uri_names() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let keys = keys(directory.path(), &[("alice", KEY)]);
        let file = format!("--tls-psk={}", keys.display());
        let server = Server::nbdkit(&["--tls=require", &file, "pattern", "64M"]);
        let uri = |user: &str| {
            format!(
                "nbds+unix://{user}/?socket={}&tls-psk-file={}",
                server.socket().display(),
                keys.display()
            )
        };
        let node = NbdNode::connect(&uri("alice@"), NbdOptions::default()).await.unwrap();
        assert!(read(&*node, 12345, 20 << 20).await.unwrap() == pattern(12345, 20 << 20));
        node.close().await.unwrap();
        for (user, words) in [("", "USER@HOST"), ("carol@", "\"carol\" is not in")] {
            let error = NbdNode::connect(&uri(user), NbdOptions::default()).await.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(words), "{error}");
        }
    });
}

#[test]
fn a_wrong_key_and_an_unknown_user_are_refused_at_once() {
    run(async {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let image = theirs.path().join("image.raw");
        std::fs::write(&image, vec![0; 1 << 20]).unwrap();
        let server = qemu_nbd(&keys(theirs.path(), &[("alice", KEY)]), &image);
        let wrong = KEY.replace('f', "e");
        let ours = keys(ours.path(), &[("alice", &wrong), ("bob", KEY)]);
        for user in ["alice", "bob"] {
            let error = open(&server, &ours, user).await.err().unwrap();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
            assert!(error.to_string().contains("keys.psk"), "{error}");
        }
        let options = NbdOptions::default();
        let plain = NbdNode::open(Address::Unix { path: server.socket() }, "", options).await;
        assert!(plain.err().unwrap().to_string().contains("requires TLS"));
    });
}
