//! What a guest was told is durable is in the image after a kill, be it that its driver flushes or that it can't.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::thread::JoinHandle;

use headwater_block::{Disk, DiskOptions, Edge, TokioClock};
use headwater_export::Listen;
use headwater_export::vhost::{BlkExport, VhostUserBlk};
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use headwater_storage::file::{Engine, FileNode, FileOptions, IoMode};

use crate::server::writable;
use headwater_front_end::protocol::*;
use headwater_front_end::*;

const OUT: u32 = 1;
const FLUSH: u32 = 4;
const WRITE_ZEROES: u32 = 13;

/// How far apart writes are, in sectors: each needs a cluster and a table of its own.
const APART: u64 = (64 << 20) / 512;

fn qemu_img(words: &[&str], image: &Path) -> (Option<i32>, String) {
    let done = Command::new("qemu-img").args(words).arg(image).output().unwrap();
    (done.status.code(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
}

/// Serves an image in a thread that ends as a kill would, without a word to the image, when told to.
fn serve(socket: &Path, image: &Path) -> (tokio::sync::oneshot::Sender<()>, JoinHandle<()>) {
    let (kill, killed) = tokio::sync::oneshot::channel();
    let (bound, when_bound) = std::sync::mpsc::channel();
    let (socket, image) = (socket.to_owned(), image.to_owned());
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let engine = Engine::new(IoMode::Auto).unwrap();
            let file = FileNode::open(&engine, &image, FileOptions::default()).unwrap();
            let children = Children { data_file: None, backing: None };
            let options = Qcow2Options { read_only: false, cache_size: 32 << 20, ..Qcow2Options::default() };
            let node = Qcow2Node::open(file, children, options).await.unwrap();
            let disk = Disk::new(node, Rc::new(TokioClock::new()), DiskOptions::default());
            let export = BlkExport { id: "durable".to_owned(), edge: Edge::new(disk), options: writable() };
            let export = VhostUserBlk::start(Listen::Unix { path: socket }, export).unwrap();
            bound.send(()).unwrap();
            killed.await.unwrap();
            // Not dropped, which would tell it to finish its work; without its runtime, it does nothing any more. What it leaves is the lock of
            // the file.
            std::mem::forget(export);
        });
    });
    when_bound.recv().unwrap();
    (kill, thread)
}

#[test]
fn a_kill_loses_nothing_that_a_guest_takes_for_durable() {
    let flushes = feature::FLUSH | feature::WRITE_ZEROES;
    for (features, wce, flush) in [
        (feature::WRITE_ZEROES, None, false),
        (flushes, None, true),
        (flushes | feature::CONFIG_WCE, Some(0), false),
        (flushes | feature::CONFIG_WCE, Some(1), true),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let (image, socket) = (directory.path().join("disk.qcow2"), directory.path().join("disk.sock"));
        let made =
            Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1G").status();
        assert!(made.unwrap().success());
        let (kill, thread) = serve(&socket, &image);
        let guest = Guest::new();
        let (client, mut ring) = Client::ready(&socket, &guest, features);
        if let Some(wce) = wce {
            assert!(client.set_wce(wce));
        }
        for file in 0..11_u64 {
            let data = [file as u8 + 1; 4096];
            assert_eq!(ring.request(&guest, OUT, file * APART, &data, 0).0, 0);
        }
        // Zeroes over the last of them.
        let range = [(10 * APART).to_le_bytes().to_vec(), words(&[4, 0])].concat();
        assert_eq!(ring.request(&guest, WRITE_ZEROES, 0, &range, 0).0, 0);
        if flush {
            assert_eq!(ring.request(&guest, FLUSH, 0, &[], 0).0, 0);
        }
        kill.send(()).unwrap();
        thread.join().unwrap();

        let (code, report) = qemu_img(&["check", "-U"], &image);
        assert!(matches!(code, Some(0 | 3)), "nothing but leaks may be left: {report}");
        let raw = directory.path().join("disk.raw");
        let words = ["convert", "-U", "-O", "raw", image.to_str().unwrap()];
        assert_eq!(qemu_img(&words, &raw).0, Some(0));
        let raw = std::fs::File::open(&raw).unwrap();
        for file in 0..11_u64 {
            let mut found = [0xee; 4096];
            std::os::unix::fs::FileExt::read_exact_at(&raw, &mut found, file * APART * 512).unwrap();
            let mut wanted = [file as u8 + 1; 4096];
            if file == 10 {
                wanted[..2048].fill(0);
            }
            assert!(found == wanted, "file {file} with features {features:#x}, cache mode {wce:?}");
        }
        drop(client);
    }
}
