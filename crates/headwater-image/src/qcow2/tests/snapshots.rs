//! Internal snapshots: taken and deleted among random changes, compared with models and with QEMU's tools.

use super::*;
use crate::qcow2::snapshots::NewSnapshot;
use headwater_block::{Buffer, ErrorKind, WriteFlags, ZeroFlags};
use headwater_sim::Sim;
use std::time::Duration;

/// A snapshot that was taken, and what the disk held then.
struct Taken {
    id: String,
    name: String,
    content: Vec<u8>,
}

fn new(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.into(),
        date: Duration::new(1_700_000_000, 5),
        vm_clock: Duration::from_millis(12_345),
    }
}

async fn change(node: &Qcow2Node, rng: &Rng, model: &mut [u8]) {
    let range = rng.byte_range(model.len() as u64, model.len() as u64 / 3 + 1024, 512);
    let (start, end) = (range.start as usize, range.end as usize);
    match rng.range(0..6) {
        0 => {
            let unmap = rng.one_in(2);
            node.write_zeroes(
                range.start,
                range.end - range.start,
                ZeroFlags { unmap, ..Default::default() },
            )
            .await
            .unwrap();
            model[start..end].fill(0);
        }
        1 => {
            node.discard(range.start, range.end - range.start).await.unwrap();
            let now = read_all(node).await;
            let kept =
                model[start..end].iter().zip(&now[start..end]).all(|(old, now)| *now == *old || *now == 0);
            assert!(kept, "a discard leaves what was there, or zeroes");
            model[start..end].copy_from_slice(&now[start..end]);
        }
        2 => node.flush().await.unwrap(),
        _ => {
            let fill = rng.range(0..256) as u8;
            let data = Buffer::copy_of(&vec![fill; end - start]);
            node.write(range.start, data, WriteFlags::default()).await.unwrap();
            model[start..end].fill(fill);
        }
    }
}

/// What QEMU says of the image: it is sound, lists the same snapshots, and reads each of them as it was.
fn compare(image: &[u8], kind: &Kind, content: &[u8], taken: &[Taken], what: &str) {
    check_with_qemu(kind, image, content, what);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("image.qcow2"), image).unwrap();
    if let Some(backing) = &kind.backing {
        std::fs::write(dir.path().join("base.raw"), backing).unwrap();
    }
    let (ok, list) = qemu_img(dir.path(), &["snapshot", "-l", "image.qcow2"]);
    assert!(ok, "{what}: {list}");
    let names: Vec<&str> = list.lines().skip(2).filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(names, taken.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), "{what}: {list}");
    for one in taken {
        let arg = format!("snapshot.name={}", one.name);
        let (ok, text) =
            qemu_img(dir.path(), &["convert", "-l", &arg, "-O", "raw", "image.qcow2", "then.raw"]);
        assert!(ok, "{what}: {text}");
        assert_same(&std::fs::read(dir.path().join("then.raw")).unwrap(), &one.content, what);
    }
}

async fn one_run(seed: u64) {
    let rng = Rng::new(seed ^ 0x736e_6170);
    let mut kind = Kind::random(&rng);
    if kind.create.version == 3 {
        kind.create.refcount_bits = kind.create.refcount_bits.max(4);
    }
    let what = format!("seed {seed}: {:?}", kind.create);
    let file = MemoryNode::new("image.qcow2", Vec::new());
    create(&*file, &kind.create).await.unwrap();
    let mut model = kind.content();
    let mut taken: Vec<Taken> = Vec::new();
    let mut node = open(&kind, file.clone()).await;
    for n in 0..rng.range(4..14) {
        match rng.range(0..8) {
            0..3 if taken.len() < 6 => {
                let name = format!("s{n}{}", "x".repeat(rng.index(200)));
                let made = node.take_snapshot(&new(&name)).await.unwrap();
                assert_eq!(
                    (made.name.as_str(), made.date_sec, made.vm_clock_sec),
                    (&*name, 1_700_000_000, 12)
                );
                taken.push(Taken { id: made.id, name, content: model.clone() });
            }
            3 if !taken.is_empty() => {
                let gone = taken.remove(rng.index(taken.len()));
                assert_eq!(node.delete_snapshot(&gone.id).await.unwrap().name, gone.name, "{what}");
            }
            4 => {
                node.close().await.unwrap();
                node = open(&kind, file.clone()).await;
            }
            _ => change(&node, &rng, &mut model).await,
        }
        assert_same(&read_all(&*node).await, &model, &what);
        let listed: Vec<String> = node.snapshots().await.unwrap().into_iter().map(|one| one.id).collect();
        assert_eq!(listed, taken.iter().map(|one| one.id.clone()).collect::<Vec<_>>(), "{what}");
    }
    node.close().await.unwrap();
    check_clean(file.clone(), false, &what).await;
    compare(&file.contents(), &kind, &model, &taken, &what);
    // Deleting all of them gives everything back.
    let node = open(&kind, file.clone()).await;
    for one in &taken {
        node.delete_snapshot(&one.id).await.unwrap();
    }
    node.close().await.unwrap();
    check_clean(file.clone(), false, &what).await;
    compare(&file.contents(), &kind, &model, &[], &what);
}

#[test]
fn snapshots_are_what_the_disk_was_and_cost_nothing_when_they_are_gone() {
    headwater_sim::for_seeds(30, |seed| Sim::new(seed).run(one_run(seed)));
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    Sim::new(1).run(async {
        let kind = |create: CreateOptions| Kind { create, backing: None, options: Qcow2Options::default() };
        let narrow = CreateOptions { refcount_bits: 1, ..CreateOptions::new(1 << 20) };
        let file = MemoryNode::new("image.qcow2", Vec::new());
        create(&*file, &narrow).await.unwrap();
        let node = open(&kind(narrow), file.clone()).await;
        node.take_snapshot(&new("of nothing")).await.unwrap();
        node.write(0, Buffer::copy_of(&[1; 512]), WriteFlags::default()).await.unwrap();
        let before = file.contents();
        let refused = node.take_snapshot(&new("second")).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        let refused = node.take_snapshot(&new("of nothing")).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists, "{refused}");
        let refused = node.take_snapshot(&new("")).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
        let refused = node.delete_snapshot("7").await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::NotFound, "{refused}");
        assert!(file.contents().len() <= before.len().next_multiple_of(65536) + 65536 * 2);
        node.close().await.unwrap();
        check_clean(file, false, "after refusals").await;
    });
}
