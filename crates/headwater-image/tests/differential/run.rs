//! One seed.

use super::geometry::{self, Geometry};
use super::model::{Model, Request};
use super::tools::{Files, assert_same, contents, qemu_io, run};
use futures_util::future::join_all;
use headwater_block::{Buffer, Disk, DiskOptions, TokioClock, WriteFlags, ZeroFlags};
use headwater_image::qcow2::check::{CheckOptions, check};
use headwater_image::qcow2::create::create;
use headwater_image::{Format, OpenOptions, ProtocolOpener, ProtocolOptions, open_image};
use headwater_storage::file::{Cache, Engine, FileNode, FileOptions, IoMode};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::rc::Rc;

/// The name of the internal snapshot that some images have.
const SNAPSHOT: &str = "before";

/// What a seed decides.
struct Plan {
    geometry: Geometry,
    backing: Option<(String, Format)>,
    /// The image is made by headwater, not by QEMU.
    created_here: bool,
    snapshot: bool,
    cache: Cache,
    cache_size: u64,
}

/// Runs everything that `seed` stands for, and panics with what went wrong.
pub(crate) fn one(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let chain = geometry::chain(&mut rng, dir);
    let mut plan = Plan {
        geometry: Geometry::random(&mut rng, chain.is_some()),
        backing: chain.as_ref().map(|(backing, _)| backing.clone()),
        created_here: rng.random(),
        snapshot: false,
        cache: if rng.random() { Cache::Auto } else { Cache::Buffered },
        cache_size: if rng.random() { 0 } else { 4 << 20 },
    };
    // Many compressed clusters share a host cluster, and a snapshot doubles its count.
    let refcounts_suffice = plan.geometry.refcount_bits >= 16;
    plan.snapshot =
        !plan.created_here && !plan.geometry.data_file && refcounts_suffice && rng.random_bool(0.4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let files = Files { engine: Engine::new(IoMode::Auto).unwrap(), cache: plan.cache };
        let initial = prepare(&mut rng, dir, &plan, &files, chain.map(|(_, bytes)| bytes)).await;
        let mut model = Model::new(initial.clone());
        let what = format!(
            "{:?} over {:?}{}{}",
            plan.geometry,
            plan.backing,
            if plan.created_here { "" } else { ", made by QEMU" },
            if plan.snapshot { ", with a snapshot" } else { "" }
        );
        let log = drive(&mut rng, dir, &plan, &files, &mut model).await;
        let log = format!("{what}\n{}", log.join("\n"));
        verify(dir, &plan, &files, &model, &initial, &log).await;
    });
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).to_str().unwrap().to_owned()
}

/// Makes the two images, ours.qcow2 and theirs.qcow2, and returns what both contain.
async fn prepare(
    rng: &mut StdRng,
    dir: &Path,
    plan: &Plan,
    files: &Files,
    below: Option<Vec<u8>>,
) -> Vec<u8> {
    let geometry = &plan.geometry;
    let data_file = |name: &'static str| geometry.data_file.then_some(name);
    geometry.create_with_qemu(dir, "theirs.qcow2", plan.backing.as_ref(), data_file("theirs.data"));
    if plan.created_here {
        if geometry.data_file {
            std::fs::File::create(dir.join("ours.data")).unwrap().set_len(geometry.size).unwrap();
        }
        let options = geometry.create_options(plan.backing.clone(), data_file("ours.data"));
        let file = FileNode::create(&files.engine, dir.join("ours.qcow2"), FileOptions::default()).unwrap();
        create(&*file, &options).await.unwrap();
        drop(file);
        let mut bytes = below.unwrap_or_default();
        bytes.resize(geometry.size as usize, 0);
        return bytes;
    }
    let commands = geometry::filling(rng, geometry.size, geometry.cluster(), !geometry.data_file);
    if geometry.data_file {
        geometry.create_with_qemu(dir, "ours.qcow2", None, Some("ours.data"));
        qemu_io(dir, "ours.qcow2", &commands);
        qemu_io(dir, "theirs.qcow2", &commands);
    } else {
        qemu_io(dir, "theirs.qcow2", &commands);
        if plan.snapshot {
            run(dir, "qemu-img", &["snapshot", "-c", SNAPSHOT, "theirs.qcow2"]);
        }
        std::fs::copy(dir.join("theirs.qcow2"), dir.join("ours.qcow2")).unwrap();
    }
    contents(dir, "theirs.qcow2", None)
}

/// Sends random requests to headwater's disk, and then the same to QEMU's. Returns what was sent.
async fn drive(rng: &mut StdRng, dir: &Path, plan: &Plan, files: &Files, model: &mut Model) -> Vec<String> {
    // QEMU resizes neither images of version 2 with snapshots nor, when they grow over data of the backing, without zero clusters.
    let v2 = plan.geometry.version == 2;
    let resizable = !(plan.snapshot || v2 && plan.backing.is_some());
    let options = OpenOptions { cache_size: plan.cache_size, ..OpenOptions::default() };
    let mut log = Vec::new();
    let mut commands = Vec::new();
    for _ in 0..rng.random_range(1..=3) {
        let image = open_image(&path(dir, "ours.qcow2"), &options, files).await.unwrap();
        let clock = Rc::new(TokioClock::new());
        let disk = Disk::new(image.node.clone(), clock, DiskOptions::default());
        for _ in 0..rng.random_range(1..40) {
            let size = model.bytes.len() as u64;
            let request = Request::random(rng, size, plan.geometry.cluster(), resizable);
            log.push(format!("{request:?}"));
            commands.extend(request.commands());
            apply(&disk, model, &request, plan.geometry.cluster(), &log).await;
        }
        let end = model.bytes.len() as u64;
        let all = disk.read(0, end).await.unwrap_or_else(|err| panic!("{}\nread all: {err}", log.join("\n")));
        assert_same(
            &format!("{}\nheadwater's disk before closing", log.join("\n")),
            &model.bytes,
            &all,
            |_| true,
        );
        disk.close().await.unwrap();
        drop(disk);
        image.close_below().await.unwrap();
        log.push("-- opened again".to_owned());
    }
    qemu_io(dir, "theirs.qcow2", &commands);
    log
}

/// Carries out one request, and compares.
async fn apply(disk: &Rc<Disk>, model: &mut Model, request: &Request, cluster: u64, log: &[String]) {
    let done = match request {
        Request::Write { offset, len, pattern, compressed } => {
            model.fill(*offset, *len, *pattern);
            let flags = WriteFlags { fua: len % 7 == 0, compressed: *compressed };
            disk.write(*offset, pattern_of(*len, *pattern), flags).await
        }
        Request::Zero { offset, len, unmap } => {
            model.fill(*offset, *len, 0);
            disk.write_zeroes(*offset, *len, ZeroFlags { unmap: *unmap, ..ZeroFlags::default() }).await
        }
        Request::Discard { offset, len } => {
            disk.discard(*offset, *len).await.unwrap_or_else(|err| panic!("{}\n{err}", log.join("\n")));
            disk.read(*offset, *len).await.map(|found| model.discarded(*offset, &found))
        }
        Request::Read { offset, len } => disk.read(*offset, *len).await.map(|found| {
            let range = *offset as usize..(offset + len) as usize;
            assert_same(&log.join("\n"), &model.bytes[range], &found, |_| true);
        }),
        Request::Flush => disk.flush().await,
        Request::Resize { size } => {
            model.resize(*size, cluster);
            disk.resize(*size).await
        }
        Request::Burst(writes) => {
            for (offset, len, pattern) in writes {
                model.fill(*offset, *len, *pattern);
            }
            let writes = writes.iter().map(|(offset, len, pattern)| {
                let flags = WriteFlags { compressed: pattern % 3 == 0, ..WriteFlags::default() };
                disk.write(*offset, pattern_of(*len, *pattern), flags)
            });
            join_all(writes).await.into_iter().collect()
        }
    };
    done.unwrap_or_else(|err| panic!("{}\n{err}", log.join("\n")));
}

fn pattern_of(len: u64, byte: u8) -> Buffer {
    Buffer::copy_of(&vec![byte; len as usize])
}

/// Asks everybody what both images contain now, and whether they are sound.
async fn verify(dir: &Path, plan: &Plan, files: &Files, model: &Model, initial: &[u8], log: &str) {
    run_check(dir, log);
    let theirs = contents(dir, "theirs.qcow2", None);
    assert_same(&format!("{log}\nQEMU reads its image"), &model.bytes, &theirs, |i| !model.open[i]);
    let ours = contents(dir, "ours.qcow2", None);
    assert_same(&format!("{log}\nQEMU reads headwater's image"), &model.bytes, &ours, |_| true);
    for (image, expected) in [("ours.qcow2", &model.bytes), ("theirs.qcow2", &theirs)] {
        let found = read_all(&path(dir, image), files).await;
        assert_same(&format!("{log}\nheadwater reads {image}"), expected, &found, |_| true);
        let how = ProtocolOptions { read_only: true, ..ProtocolOptions::default() };
        let file = files.open(&path(dir, image), how).await.unwrap();
        let report = check(file, CheckOptions::default()).await.unwrap();
        assert!(report.is_clean(), "{log}\nheadwater checks {image}: {report:#?}");
    }
    if plan.snapshot {
        let kept = contents(dir, "ours.qcow2", Some(SNAPSHOT));
        assert_same(&format!("{log}\nthe snapshot in headwater's image"), initial, &kept, |_| true);
    }
}

/// Fails unless qemu-img finds headwater's image sound.
fn run_check(dir: &Path, log: &str) {
    let out = std::process::Command::new("qemu-img")
        .args(["check", "ours.qcow2"])
        .current_dir(dir)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{log}\nqemu-img check: {text}{}", String::from_utf8_lossy(&out.stderr));
}

/// Everything that headwater reads from an image.
async fn read_all(image: &str, files: &Files) -> Vec<u8> {
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let opened = open_image(image, &options, files).await.unwrap();
    let disk = Disk::new(opened.node.clone(), Rc::new(TokioClock::new()), DiskOptions::default());
    let bytes = disk.read(0, disk.size()).await.unwrap().to_vec();
    disk.close().await.unwrap();
    drop(disk);
    opened.close_below().await.unwrap();
    bytes
}
