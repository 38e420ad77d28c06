//! What must hold of the files that a power cut leaves.

use crate::promise::{Allowed, SECTOR};
use crate::run::{Run, stream_on};
use crate::snapshots::only_lacks_marks;
use crate::world::{UNKNOWN_AUTOCLEAR, Workload, World, as_snapshot, now, read, text};
use headwater_block::memory::MemoryNode;
use headwater_block::{Buffer, Node, WriteFlags};
use headwater_image::qcow2::check::{CheckOptions, CheckReport, Repair, check};
use headwater_image::qcow2::header::Header;
use headwater_image::qcow2::{Children, Qcow2Node};
use headwater_sim::Rng;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

/// How closely a state is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// It is in order, opens, and holds what it must.
    Plain,
    /// And leaks can be repaired, it can be used, a stream can go on.
    Use,
    /// And QEMU agrees.
    Reference,
}

/// Looks at the files that were left at `moment`. The error says what is wrong.
pub(crate) fn verify(
    world: &World,
    run: &Run,
    moment: usize,
    allowed: &Allowed,
    files: &[Vec<u8>],
    depth: Depth,
    seed: u64,
) -> Result<(), String> {
    let nodes: Vec<Rc<MemoryNode>> = world
        .files
        .iter()
        .zip(files)
        .map(|((name, _), bytes)| MemoryNode::new(*name, bytes.clone()))
        .collect();
    let mut leaks = 0;
    // Then marks may be missing.
    let marks = run.snapshots.change_at(moment);
    for (at, node) in nodes.iter().enumerate() {
        if is_image(world, at) {
            leaks +=
                if marks { without_marks(node.clone())? } else { sound(node.clone(), Repair::None)?.leaks };
        }
    }
    let pivoted = run.pivoted.is_some_and(|pivoted| pivoted <= moment);
    let content = content(world, &nodes, pivoted)?;
    allowed.check(&content, content.len() as u64 * SECTOR)?;
    let header = now(Header::read(&*nodes[0])).map_err(text)?;
    if header.autoclear & UNKNOWN_AUTOCLEAR != 0 && changed(world, files) {
        return Err("the image has changed, but an autoclear feature is still believed".to_string());
    }
    if run.job_ended.is_some_and(|(ended, completed)| ended <= moment && completed) {
        let linked = header.backing_name.as_deref();
        let expected = match world.workload {
            Workload::Stream => None,
            Workload::StreamAbove | Workload::Commit => Some("base"),
            _ => linked,
        };
        if linked != expected {
            return Err(format!(
                "the job has completed, but the header names {linked:?} as the backing file"
            ));
        }
    }
    if let Some(expected) = &world.snapshot
        && read(&*as_snapshot(&files[0])?)? != *expected
    {
        return Err("the internal snapshot has changed".to_string());
    }
    if world.workload == Workload::Snapshots {
        run.snapshots.check(&files[0], moment)?;
    }
    if depth == Depth::Plain {
        return Ok(());
    }
    let repaired;
    let files = if marks {
        sound(nodes[0].clone(), Repair::All)?;
        if self::content(world, &nodes, pivoted)? != content {
            return Err("a repair of marks has changed what the guest reads".to_string());
        }
        run.snapshots.check(&nodes[0].contents(), moment)?;
        (leaks, repaired) = (0, vec![nodes[0].contents()]);
        &repaired[..]
    } else {
        files
    };
    if leaks > 0 {
        for (at, node) in nodes.iter().enumerate().filter(|(at, _)| is_image(world, *at)) {
            let report = sound(node.clone(), Repair::Leaks)?;
            if report.leaks > 0 {
                return Err(format!("file {at}: {} leaks are left after they were repaired", report.leaks));
            }
        }
        if self::content(world, &nodes, pivoted)? != content {
            return Err("a repair of leaks has changed what the guest reads".to_string());
        }
    }
    if depth == Depth::Reference {
        reference(files, world)?;
    }
    if matches!(world.workload, Workload::Stream | Workload::StreamAbove) {
        let streamed = stream_on(seed, &files[0], world)?;
        let file = MemoryNode::new("image", streamed);
        if now(Header::read(&*file)).map_err(text)?.backing_name.is_some() {
            return Err("a stream that went on to its end has kept the link".to_string());
        }
        let report = sound(file.clone(), Repair::None)?;
        let node = now(Qcow2Node::open(file, Children::default(), world.options())).map_err(text)?;
        // What leaked before it began still leaks.
        if report.leaks > leaks || read(&*node)? != content {
            return Err(format!("after a stream that went on: {report:?}, or the contents differ"));
        }
    }
    use_on(world, &nodes, files, pivoted, seed)
}

/// True if anything behind the header's cluster isn't as it was in the beginning.
fn changed(world: &World, files: &[Vec<u8>]) -> bool {
    let head = |at: usize| if at == 0 { world.create.cluster_size as usize } else { 0 };
    // The base of a commit is an image by itself.
    let own = if world.create.data_file.is_some() { 2 } else { 1 };
    let mut pairs = world.files.iter().zip(files).take(own).enumerate();
    pairs.any(|(at, ((_, before), after))| before[head(at)..] != after[head(at)..])
}

fn is_image(world: &World, at: usize) -> bool {
    at == 0 || world.create.data_file.is_none()
}

/// A check that finds no corruption.
fn sound(file: Rc<dyn Node>, repair: Repair) -> Result<CheckReport, String> {
    let name = file.name().to_string();
    let report = now(check(file, CheckOptions { repair, ..CheckOptions::default() })).map_err(text)?;
    match report.corruptions {
        0 => Ok(report),
        _ => Err(format!("{name} is corrupt: {report:#?}")),
    }
}

/// As [`sound`], but marks may be missing. Gives the number of leaks.
fn without_marks(file: Rc<dyn Node>) -> Result<u64, String> {
    let report = now(check(file, CheckOptions::default())).map_err(text)?;
    if only_lacks_marks(&report) {
        Ok(report.leaks)
    } else {
        Err(format!("the image is corrupt, although a snapshot was being changed: {report:#?}"))
    }
}

/// The image that the guest uses.
fn open(world: &World, nodes: &[Rc<MemoryNode>], pivoted: bool) -> Result<Rc<dyn Node>, String> {
    let others: Vec<Rc<dyn Node>> = nodes[1..].iter().map(|node| node.clone() as Rc<dyn Node>).collect();
    if pivoted {
        return world.base(&others);
    }
    let header = now(Header::read(&*nodes[0])).map_err(text)?;
    let children = world.children(&header, &others)?;
    Ok(now(Qcow2Node::open(nodes[0].clone(), children, world.options())).map_err(text)?)
}

fn content(world: &World, nodes: &[Rc<MemoryNode>], pivoted: bool) -> Result<Vec<u64>, String> {
    read(&*open(world, nodes, pivoted)?)
}

/// Goes on with what is left: what leaked is in nobody's way.
fn use_on(
    world: &World,
    nodes: &[Rc<MemoryNode>],
    files: &[Vec<u8>],
    pivoted: bool,
    seed: u64,
) -> Result<(), String> {
    for (node, bytes) in nodes.iter().zip(files) {
        // As it was before the repair.
        now(node.resize(0))
            .and_then(|()| now(node.write(0, Buffer::copy_of(bytes), WriteFlags::default())))
            .map_err(text)?;
    }
    let node = open(world, nodes, pivoted)?;
    let (rng, size) = (Rng::new(seed), node.size());
    let mut model = vec![0; size as usize];
    model.copy_from_slice(&now(node.read(0, headwater_block::BufferMut::new(size as usize))).map_err(text)?);
    for _ in 0..6 {
        let range = rng.byte_range(size, size / 4 + 1024, 512);
        let data = vec![rng.range(0..256) as u8; (range.end - range.start) as usize];
        now(node.write(range.start, Buffer::copy_of(&data), WriteFlags::default())).map_err(text)?;
        model[range.start as usize..range.end as usize].copy_from_slice(&data);
    }
    now(node.close()).map_err(text)?;
    let node = open(world, nodes, pivoted)?;
    if now(node.read(0, headwater_block::BufferMut::new(size as usize))).map_err(text)?[..] != model[..] {
        return Err("what was written after the power cut doesn't read back".to_string());
    }
    for (_, node) in nodes.iter().enumerate().filter(|(at, _)| is_image(world, *at)) {
        sound(node.clone(), Repair::None).map_err(|err| format!("used after the power cut, {err}"))?;
    }
    Ok(())
}

/// qemu-img finds no corruption either.
fn reference(files: &[Vec<u8>], world: &World) -> Result<(), String> {
    let dir = tempfile::tempdir().expect("a directory");
    let header = now(Header::read(&*MemoryNode::new("image", files[0].clone()))).map_err(text)?;
    // What lies below need only be there.
    let base = header.backing_name.as_deref().filter(|name| name.starts_with("base")).unwrap_or("base");
    let mut below = vec![(base.to_string(), Vec::new())];
    below.extend(world.mid_bytes().map(|bytes| ("mid".to_string(), bytes)));
    let recorded =
        world.files.iter().zip(files).map(|((name, _), bytes)| ((*name).to_string(), bytes.clone()));
    for (name, bytes) in below.into_iter().chain(recorded) {
        std::fs::write(dir.path().join(name), bytes).expect("it is written");
    }
    for (_, (name, _)) in world.files.iter().enumerate().filter(|(at, _)| is_image(world, *at)) {
        qemu_img_check(dir.path(), name)?;
    }
    Ok(())
}

fn qemu_img_check(dir: &Path, name: &str) -> Result<(), String> {
    let out = Command::new("qemu-img").current_dir(dir).args(["check", "-f", "qcow2", name]).output();
    let out = out.expect("qemu-img is installed");
    match out.status.code() {
        // 3 is for leaks.
        Some(0 | 3) => Ok(()),
        _ => {
            let said =
                String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
            Err(format!("qemu-img check of {name}: {said}"))
        }
    }
}
