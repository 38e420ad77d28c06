//! Locks against ourselves and against QEMU's tools, in both directions.

use super::*;
use crate::file::testing::{on_runtime, qemu_tool, scratch_file};
use crate::file::{Engine, FileNode, FileOptions, IoMode, Locking};
use headwater_block::Node;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn try_lock(path: &Path, usage: Use) -> Result<File, ErrorKind> {
    let file = File::options().read(true).write(usage == Use::Write).open(path).unwrap();
    match acquire(file.as_fd(), "disk", usage) {
        Ok(true) => Ok(file),
        Ok(false) => panic!("no locks in the directory for temporary files"),
        Err(err) => Err(err.kind()),
    }
}

#[test]
fn who_tolerates_whom() {
    let scratch = scratch_file();
    let uses = [Use::Write, Use::Read, Use::ReadShared];
    for first in uses {
        for second in uses {
            let held = try_lock(scratch.path(), first).unwrap();
            // A writer tolerates only readers that tolerate writers, and the other way.
            let writers = [first, second].contains(&Use::Write);
            let expected = !writers || [first, second].contains(&Use::ReadShared);
            let got = try_lock(scratch.path(), second);
            assert_eq!(got.is_ok(), expected, "{first:?}, then {second:?}");
            if let Err(kind) = got {
                assert_eq!(kind, ErrorKind::InUse);
                // What was refused left nothing behind.
                drop(held);
                try_lock(scratch.path(), second).unwrap();
            }
        }
    }
}

#[test]
fn locks_follow_what_a_file_is_used_for() {
    let scratch = scratch_file();
    let file = File::options().read(true).write(true).open(scratch.path()).unwrap();
    change(file.as_fd(), "disk", None, Some(Use::Write)).unwrap();
    assert!(try_lock(scratch.path(), Use::Read).is_err());
    change(file.as_fd(), "disk", Some(Use::Write), Some(Use::Read)).unwrap();
    let reader = try_lock(scratch.path(), Use::Read).expect("readers tolerate each other");
    assert!(
        change(file.as_fd(), "disk", Some(Use::Read), Some(Use::Write)).is_err(),
        "a reader is in the way"
    );
    drop(reader);
    assert!(try_lock(scratch.path(), Use::Write).is_err(), "what was held before the failure is held again");
    change(file.as_fd(), "disk", Some(Use::Read), None).unwrap();
    try_lock(scratch.path(), Use::Write).unwrap();
}

#[test]
fn released_means_released() {
    let scratch = scratch_file();
    let held = try_lock(scratch.path(), Use::Write).unwrap();
    release(held.as_fd());
    try_lock(scratch.path(), Use::Write).unwrap();
}

#[test]
fn a_file_that_is_dropped_gives_its_locks_back_although_a_child_has_it_open() {
    let scratch = scratch_file();
    on_runtime(async {
        let engine = Engine::new(IoMode::Threads).unwrap();
        let file = FileNode::open(&engine, scratch.path(), options(false)).unwrap();
        // What a fork does.
        let _inherited = file.file.fd.try_clone().unwrap();
        assert!(try_lock(scratch.path(), Use::Write).is_err());
        drop(file);
        try_lock(scratch.path(), Use::Write).unwrap();
    });
}

/// An image of a format that reads its metadata once and so wants nobody to write meanwhile, which a raw image wouldn't mind.
fn qcow2_image() -> Option<(PathBuf, tempfile::TempPath)> {
    let (qemu_img, qemu_io) = (qemu_tool("qemu-img")?, qemu_tool("qemu-io")?);
    let path = scratch_file().into_temp_path();
    let status = Command::new(qemu_img).args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status();
    assert!(status.unwrap().success());
    Some((qemu_io, path))
}

fn options(read_only: bool) -> FileOptions {
    FileOptions { read_only, ..FileOptions::default() }
}

#[test]
fn qemu_respects_our_locks() {
    let Some((qemu_io, image)) = qcow2_image() else { return };
    on_runtime(async {
        let run = |read_only: bool| {
            let mut command = Command::new(&qemu_io);
            command.args(["-f", "qcow2", "-c", "read 0 512"]);
            if read_only {
                command.arg("-r");
            }
            let output = command.arg(&image).output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        };
        let engine = Engine::new(IoMode::Auto).unwrap();
        let node = FileNode::open(&engine, &image, options(false)).unwrap();
        let (ok, text) = run(false);
        assert!(!ok && text.contains("Failed to get \"write\" lock"), "{text}");
        let (ok, text) = run(true);
        assert!(!ok && text.contains("Failed to get shared \"write\" lock"), "{text}");
        node.close().await.unwrap();
        drop(node);
        let reader = FileNode::open(&engine, &image, options(true)).unwrap();
        let (ok, text) = run(false);
        assert!(!ok && text.contains("Failed to get \"write\" lock"), "{text}");
        assert!(run(true).0, "readers share");
        drop(reader);
        assert!(run(false).0, "nobody holds it any more");
    });
}

#[test]
fn we_respect_qemus_locks() {
    let Some((qemu_io, image)) = qcow2_image() else { return };
    on_runtime(async {
        let engine = Engine::new(IoMode::Auto).unwrap();
        let open = |options| FileNode::open(&engine, &image, options).map(drop).map_err(|err| err.kind());
        for (mode, writer, reader) in
            [("-n", Err(ErrorKind::InUse), Err(ErrorKind::InUse)), ("-r", Err(ErrorKind::InUse), Ok(()))]
        {
            let mut qemu = Command::new(&qemu_io)
                .args(["-f", "qcow2", mode])
                .arg(&image)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // Once it answers, it has opened the image.
            let mut stdin = qemu.stdin.take().unwrap();
            stdin.write_all(b"length\n").unwrap();
            let mut answer = String::new();
            let mut stdout = BufReader::new(qemu.stdout.take().unwrap());
            while !answer.contains("MiB") && stdout.read_line(&mut answer).unwrap() > 0 {}
            assert_eq!(open(options(false)), writer, "qemu-io {mode}");
            assert_eq!(open(options(true)), reader, "qemu-io {mode}");
            assert_eq!(open(FileOptions { force_share: true, ..options(true) }), Ok(()), "qemu-io {mode}");
            assert_eq!(
                open(FileOptions { locking: Locking::Off, ..options(false) }),
                Ok(()),
                "qemu-io {mode}"
            );
            stdin.write_all(b"quit\n").unwrap();
            qemu.wait().unwrap();
        }
        assert_eq!(open(options(false)), Ok(()));
        let message = {
            let _held = try_lock(&image, Use::Write).unwrap();
            FileNode::open(&engine, &image, options(false)).unwrap_err().to_string()
        };
        assert!(message.contains(image.to_str().unwrap()) && message.contains("Stop"), "{message}");
    });
}
