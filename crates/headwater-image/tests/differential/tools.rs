//! QEMU's tools, and files as nodes.

use headwater_block::{LocalFuture, Node, Result};
use headwater_image::{ProtocolOpener, ProtocolOptions};
use headwater_storage::file::{Cache, Engine, FileNode, FileOptions};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

/// Opens local files.
pub(crate) struct Files {
    pub(crate) engine: Rc<Engine>,
    pub(crate) cache: Cache,
}

impl ProtocolOpener for Files {
    fn open<'a>(&'a self, name: &'a str, how: ProtocolOptions) -> LocalFuture<'a, Result<Rc<dyn Node>>> {
        Box::pin(async move {
            let options = FileOptions {
                read_only: how.read_only,
                force_share: how.force_share,
                cache: self.cache,
                ..FileOptions::default()
            };
            Ok(FileNode::open(&self.engine, name, options)? as Rc<dyn Node>)
        })
    }
}

/// Runs a program in `dir`; it must succeed.
pub(crate) fn run(dir: &Path, program: &str, args: &[&str]) -> String {
    let out = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|err| panic!("{program}: {err}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{program} {args:?}: {}\n{stdout}\n{stderr}", out.status);
    stdout.into_owned()
}

/// Sends qemu-io all commands at once; each must succeed.
pub(crate) fn qemu_io(dir: &Path, image: &str, commands: &[String]) {
    if commands.is_empty() {
        return;
    }
    let mut args = vec!["-t", "unsafe"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(image);
    run(dir, "qemu-io", &args);
}

/// What QEMU reads from an image (or from its snapshot).
pub(crate) fn contents(dir: &Path, image: &str, snapshot: Option<&str>) -> Vec<u8> {
    let mut args = vec!["convert", "-O", "raw"];
    if let Some(snapshot) = snapshot {
        args.extend(["-l", snapshot]);
    }
    args.extend([image, "contents.raw"]);
    run(dir, "qemu-img", &args);
    let bytes = std::fs::read(dir.join("contents.raw")).unwrap();
    std::fs::remove_file(dir.join("contents.raw")).unwrap();
    bytes
}

/// Fails unless two contents are equal where `cared` says so.
pub(crate) fn assert_same(what: &str, expected: &[u8], found: &[u8], cared: impl Fn(usize) -> bool) {
    assert_eq!(expected.len(), found.len(), "{what}: sizes");
    let differs = |i: &usize| expected[*i] != found[*i] && cared(*i);
    if let Some(first) = (0..expected.len()).find(differs) {
        let count = (0..expected.len()).filter(differs).count();
        let last = (0..expected.len()).rev().find(differs).unwrap_or(first);
        panic!(
            "{what}: {count} bytes differ between {first} and {last}, the first is {:#04x} instead of {:#04x}",
            found[first], expected[first]
        );
    }
}
