//! What the broker makes of monitors, of desks and of headers.

use super::*;
use serde_json::json;
use std::io::Write;
use std::os::unix::net as unix;
use std::process::Command;
use std::time::Duration;

fn grants() -> Shared {
    Arc::new(Mutex::new(Grants::new("/nowhere".into())))
}

/// Whether a word was heard, which only this tells that isn't for opening files.
fn has_heard(grants: &Shared, name: &str) -> bool {
    format!("{:?}", grants.lock().unwrap()).contains(name)
}

fn run(work: impl Future<Output = ()>) {
    let limited = async {
        tokio::time::timeout(Duration::from_secs(20), work)
            .await
            .map_err(|_| Failure::new("it takes too long"))
    };
    runtime::run(limited).unwrap();
}

fn chardev(path: &Path) -> opts::Chardev {
    let text = format!("socket,id=c,path={},server=on,wait=off", path.display());
    match opts::parse_chardev(&text).unwrap() {
        opts::ParsedChardev::Chardev(chardev) => chardev,
        opts::ParsedChardev::Help => panic!("no help was asked for"),
    }
}

#[test]
fn a_name_is_granted_before_the_command_arrives_that_has_it() {
    run(async {
        let grants = grants();
        let (mut client, server) = unix::UnixStream::pair().unwrap();
        let (pass_on, passed_on) = unix::UnixStream::pair().unwrap();
        for end in [&server, &pass_on, &passed_on] {
            end.set_nonblocking(true).unwrap();
        }
        relay(UnixStream::from_std(server).unwrap(), pass_on, &grants).unwrap();
        let mut passed_on = UnixStream::from_std(passed_on).unwrap();
        let command =
            json!({"execute": "blockdev-add", "arguments": {"driver": "file", "filename": "named.img"}});
        let command = command.to_string().into_bytes();
        // In pieces, and garbage before it.
        let bytes = [b"}]{nonsense: \"filename\" \xff\n", &command[..]].concat();
        let mut arrived = Vec::new();
        for piece in bytes.chunks(7) {
            client.write_all(piece).unwrap();
            while arrived.len() < bytes.len() {
                let mut more = [0; 64];
                let wait = Duration::from_millis(20);
                let Ok(read) = tokio::time::timeout(wait, passed_on.read(&mut more)).await else { break };
                arrived.extend_from_slice(&more[..read.unwrap()]);
                assert!(arrived.len() < bytes.len() || has_heard(&grants, "named.img"));
            }
        }
        assert_eq!(arrived, bytes);
        // The end of one end is that of the other.
        drop(passed_on);
        client.set_nonblocking(true).unwrap();
        assert_eq!(UnixStream::from_std(client).unwrap().read(&mut [0; 1]).await.unwrap(), 0);
    });
}

#[test]
fn a_desk_that_is_asked_for_something_else_is_closed_and_nothing_is_granted() {
    for garbage in [&b"x"[..], b"n", b"oo", b"k/etc/shadow", &[0xff; 4000]] {
        run(async move {
            let directory = tempfile::tempdir().unwrap();
            let (ours, theirs) = desk::pair().unwrap();
            let grants = grants();
            let before = format!("{grants:?}");
            let asked = chardev(&directory.path().join("qmp"));
            let attending = tokio::task::spawn_local(attend(theirs, asked, grants.clone()));
            let desk = Desk::new(ours).unwrap();
            desk.send(garbage, &[]).await.unwrap();
            attending.await.unwrap();
            assert!(desk.receive().await.unwrap().is_none());
            assert_eq!(format!("{grants:?}"), before);
        });
    }
}

#[test]
fn a_monitor_is_not_reached_from_inside() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let (ours, theirs) = desk::pair().unwrap();
        let attending = tokio::task::spawn_local(attend(theirs, chardev(&path), grants()));
        let desk = Desk::new(ours).unwrap();
        assert!(desk.open().await.unwrap().ends_with("qmp,server=on"));
        desk.send(desk::NEXT, &[]).await.unwrap();
        // This process stands for the broker, which connects for the data plane.
        let mut client = UnixStream::connect(&path).await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0, "it is shut again");
        let answer = tokio::time::timeout(Duration::from_millis(50), desk.receive()).await;
        assert!(answer.is_err(), "nothing is handed over");
        drop(desk);
        attending.await.unwrap();
        assert!(!path.exists());
    });
}

#[test]
fn a_header_names_what_it_may() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().canonicalize().unwrap().join(name);
    std::fs::create_dir(at("sub")).unwrap();
    std::fs::create_dir(at("other")).unwrap();
    for name in ["base", "sub/base", "other/base"] {
        File::create(at(name)).unwrap().set_len(1 << 20).unwrap();
    }
    let image = |name: &str, backing: &str| {
        let done = Command::new("qemu-img")
            .args(["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw"])
            .args([at(name).to_str().unwrap(), "1M"])
            .status();
        assert!(done.unwrap().success());
    };
    image("sub/above", "../base");
    image("beside", "base");
    image("below", "sub/base");
    image("allowed", &at("other/base").to_string_lossy());
    image("sub/remote", "nbd://localhost/x");
    let outside = tempfile::NamedTempFile::new().unwrap();
    image("outside", &outside.path().to_string_lossy());
    std::fs::write(at("broken"), [MAGIC, &[0xff; 600]].concat()).unwrap();
    std::fs::write(at("short"), b"QFI\xfb").unwrap();
    let mut trust = Trust::default();
    trust.allow_source(&at("other").to_string_lossy());
    let names = names(trust);
    for (image, named) in [
        ("beside", Some("base")),
        ("below", Some("sub/base")),
        ("allowed", Some("other/base")),
        ("sub/above", None),
        ("sub/remote", None),
        ("outside", None),
        ("base", None),
        ("broken", None),
        ("short", None),
    ] {
        let found = names(&File::open(at(image)).unwrap(), &at(image));
        let expected = named.map(|name| Named { path: at(name), header: false });
        assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{image}");
    }
}
