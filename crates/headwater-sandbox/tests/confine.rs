//! A confined process writes where it was told to, and runs nothing.

use headwater_sandbox::confine;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

const DIRECTORY: &str = "HEADWATER_TEST_CONFINED_IN";

/// What the process that is confined attempts; the test starts it as a process of its own, because there is no way back.
fn attempts(directory: &Path) {
    let at = |name: &str| directory.join(name);
    let mut open = File::options().append(true).open(at("open")).unwrap();
    match confine(&[at("mine"), at("missing")], &[at("single")]) {
        Ok(()) => {}
        Err(why) => return println!("skipped: {why}"),
    }
    let ours = || {
        fs::write(at("mine/new"), "x").unwrap();
        fs::create_dir_all(at("mine/deep/er")).unwrap();
        fs::rename(at("mine/new"), at("mine/newer")).unwrap();
        fs::remove_file(at("mine/newer")).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(at("mine/socket"));
        drop(socket.unwrap());
        fs::remove_file(at("mine/socket")).unwrap();
        fs::write(at("single"), "x").unwrap();
        assert_eq!(fs::read(at("other")).unwrap(), b"other", "reading is free");
        assert!(fs::read_dir("/").is_ok());

        let denied = |done: std::io::Result<()>| {
            assert_eq!(done.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        };
        denied(fs::write(at("other"), "x"));
        denied(fs::write(at("another"), "x"));
        denied(fs::remove_file(at("other")));
        denied(fs::remove_file(at("single")));
        denied(fs::create_dir(at("directory")));
        denied(std::os::unix::fs::symlink("x", at("link")));
        denied(File::open(at("other")).and_then(|_| File::options().write(true).open(at("other"))).map(drop));
        assert!(fs::rename(at("other"), at("mine/other")).is_err());
        assert!(std::process::Command::new("/bin/true").status().is_err(), "no program runs");
    };
    ours();
    // A thread that is started afterwards may no more.
    std::thread::scope(|scope| scope.spawn(ours).join().unwrap());
    open.write_all(b"x").unwrap();
}

#[test]
fn a_confined_process_stays_where_it_was_told() {
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return attempts(Path::new(&directory));
    }
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("mine")).unwrap();
    for name in ["single", "other", "open"] {
        fs::write(directory.path().join(name), name).unwrap();
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_confined_process_stays_where_it_was_told", "--nocapture"])
        .env(DIRECTORY, directory.path())
        .status()
        .unwrap();
    assert!(child.success());
    assert_eq!(fs::read(directory.path().join("other")).unwrap(), b"other");
}
