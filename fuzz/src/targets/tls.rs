//! A directory of TLS credentials whose files hold anything, and the other side of a session that says anything.
//!
//! Input: a byte that chooses the side, keys or certificates, whether the other side is verified, and which files exist; for each of the four files
//! (authorities, certificate, key, revocations) or the one of keys a length of 2 bytes and its content; the rest is what the other side says.
//!
//! Asserted: bad files are refused with a reason that names them; a session with somebody who has no credentials that count never begins.

use super::runtime;
use crate::Target;
use arbitrary::{Result, Unstructured};
use headwater_block::ErrorKind;
use headwater_tls::{Endpoint, TlsCredentials, TlsOptions};
use std::fs;
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

/// See the module.
pub const TARGET: Target = Target { name: "tls", run, seeds, max_len: 8192 };

/// How long a session may take to fail after the other side has closed.
const SOON: Duration = Duration::from_secs(4);

/// The files of the two sides.
const FILES: [[&str; 4]; 2] = [
    ["ca-cert.pem", "server-cert.pem", "server-key.pem", "ca-crl.pem"],
    ["ca-cert.pem", "client-cert.pem", "client-key.pem", "ca-crl.pem"],
];

/// In the first byte: keys instead of certificates.
const KEYS: u8 = 0x80;

const KEY_FILE: &str = "keys.psk";

fn run(data: &[u8]) {
    // The input ends where it ends.
    let _ = attempt(&mut Unstructured::new(data));
}

fn attempt(input: &mut Unstructured<'_>) -> Result<()> {
    let choice: u8 = input.arbitrary()?;
    let endpoint = if choice & 1 == 0 { Endpoint::Server } else { Endpoint::Client };
    let keys = choice & KEYS != 0;
    let files = if keys { &[KEY_FILE][..] } else { &FILES[usize::from(choice & 1)] };
    let directory = tempfile::tempdir().expect("a directory");
    for (i, file) in files.iter().enumerate() {
        let len = usize::from(input.arbitrary::<u16>()?).min(input.len());
        let content = input.bytes(len)?;
        if choice & 4 << i == 0 {
            fs::write(directory.path().join(file), content).expect("it can be written");
        }
    }
    let said = input.bytes(input.len())?.to_vec();
    let options = match endpoint {
        Endpoint::Server if keys => TlsOptions::PskServer { keys: directory.path().join(KEY_FILE) },
        Endpoint::Client if keys => {
            TlsOptions::PskClient { keys: directory.path().join(KEY_FILE), user: "u".to_owned() }
        }
        _ => TlsOptions::X509 {
            endpoint,
            directory: directory.path().to_owned(),
            verify_peer: choice & 2 == 0,
        },
    };
    match TlsCredentials::load(&options) {
        Ok(credentials) => {
            assert_eq!(credentials.endpoint(), endpoint);
            runtime::run(async {
                let done = timeout(SOON, session(&credentials, endpoint, &said)).await;
                assert!(done.is_ok(), "a session hangs although the other side has closed");
            });
        }
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::NotFound), "{error:?}");
            let named = error.to_string();
            assert!(named.contains(&*directory.path().to_string_lossy()), "{named}");
        }
    }
    Ok(())
}

async fn session(credentials: &TlsCredentials, endpoint: Endpoint, said: &[u8]) {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    let talk = async {
        let _ = theirs.write_all(said).await;
        drop(theirs);
    };
    let (begun, ()) = match endpoint {
        Endpoint::Server => tokio::join!(async { credentials.accept(ours).await.is_ok() }, talk),
        Endpoint::Client => {
            tokio::join!(async { credentials.connect(ours, Some("localhost")).await.is_ok() }, talk)
        }
    };
    assert!(!begun, "a session began with somebody who can't know our random numbers");
}

/// What the program makes that tests make certificates with; empty where there is no openssl.
fn certificates() -> Option<tempfile::TempDir> {
    let directory = tempfile::tempdir().ok()?;
    let script =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/headwater-tls/tests/make-certificates");
    let made = std::process::Command::new(script).arg(directory.path()).arg("revoke-client").status();
    made.is_ok_and(|status| status.success()).then_some(directory)
}

fn seeds() -> Vec<Vec<u8>> {
    let hello: &[u8] = &[22, 3, 1, 0, 5, 1, 0, 0, 1, 3];
    let with_length = |content: &[u8]| [&(content.len() as u16).to_le_bytes()[..], content].concat();
    let garbage =
        [with_length(b"-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n"), with_length(b"x")];
    let mut seeds = vec![
        [&[0][..], &garbage[0], &garbage[0], &garbage[0], &garbage[1]].concat(),
        [&[1][..], &garbage[0], &garbage[1], &garbage[1], &garbage[0]].concat(),
        vec![0x7f, 0, 0, 0, 0, 0, 0, 0, 0],
    ];
    let keys = with_length(b"u:00112233445566778899aabbccddeeff\n#76:00112233445566778899aabbccddeeff00\n");
    for side in [0, 1] {
        seeds.push([&[KEYS | side][..], &keys, hello].concat());
        seeds.push([&[KEYS | side][..], &with_length(b"u:00"), hello].concat());
    }
    let Some(directory) = certificates() else { return seeds };
    for (side, files) in FILES.iter().enumerate() {
        let contents: Vec<Vec<u8>> = files
            .iter()
            .map(|file| with_length(&fs::read(directory.path().join(file)).unwrap_or_default()))
            .collect();
        for choice in [0, 2, 0x20, 0x20 | 2] {
            seeds.push([&[choice | side as u8][..], &contents.concat(), hello].concat());
        }
    }
    seeds
}
