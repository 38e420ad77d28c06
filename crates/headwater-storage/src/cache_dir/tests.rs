//! Kept blocks across processes, crashes and bounds.

use super::{CacheDir, CacheFile};
use crate::file::{Engine, IoMode};
use headwater_block::share::{BlockStore, SHARE_BLOCK};
use headwater_block::{Buffer, ErrorKind, Identity};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

const SIZE: u64 = 20 * SHARE_BLOCK + 100;

fn etag(etag: &str) -> Identity {
    Identity { contents: vec![("ETag", etag.to_owned())], ..Identity::default() }
}

fn on_runtime<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, work)
}

fn directory(path: &Path, limit: u64) -> Rc<CacheDir> {
    CacheDir::open(&Engine::new(IoMode::Threads).unwrap(), path, limit).unwrap()
}

async fn file(directory: &Rc<CacheDir>, identity: &Identity) -> Rc<CacheFile> {
    directory.file("http://h/x", SIZE, identity).await.unwrap().unwrap()
}

fn data(block: u64, byte: u8) -> Buffer {
    let len = SHARE_BLOCK.min(SIZE - block * SHARE_BLOCK);
    Buffer::copy_of(&vec![byte; len as usize])
}

fn holds(file: &CacheFile, block: u64) -> bool {
    file.holds(block * SHARE_BLOCK, (block + 1) * SHARE_BLOCK).0
}

fn the_file(path: &Path) -> PathBuf {
    let mut files = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let file = files.next().unwrap();
    assert!(files.next().is_none());
    file
}

#[test]
fn what_was_kept_is_there_for_others_and_another_day() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("cache");
    on_runtime(async {
        let directory = directory(&path, 1 << 40);
        let (mine, theirs) = (file(&directory, &etag("a")).await, file(&directory, &etag("a")).await);
        assert!(!holds(&mine, 3));
        mine.keep(3 * SHARE_BLOCK, data(3, 3));
        mine.keep(20 * SHARE_BLOCK, data(20, 20));
        mine.settle().await;
        assert!(holds(&mine, 3) && holds(&mine, 20) && !holds(&mine, 4));
        assert_eq!(mine.holds(4 * SHARE_BLOCK, SIZE), (false, 20 * SHARE_BLOCK));
        assert_eq!(mine.holds(20 * SHARE_BLOCK, SIZE), (true, SIZE));
        // Somebody else sees it when they look the next time.
        theirs.look().await.unwrap();
        assert!(holds(&theirs, 3));
        assert_eq!(&theirs.read(20 * SHARE_BLOCK..SIZE).await.unwrap()[..], &[20; 100]);
    });
    on_runtime(async {
        let directory = directory(&path, 1 << 40);
        let again = file(&directory, &etag("a")).await;
        assert!(holds(&again, 3) && !holds(&again, 4));
        assert_eq!(again.read(3 * SHARE_BLOCK..4 * SHARE_BLOCK).await.unwrap()[..], data(3, 3)[..]);
        let changed = file(&directory, &etag("b")).await;
        assert!(!holds(&changed, 3), "a source that changed meets no old bytes");
        assert!(directory.file("nbd://h/x", SIZE, &Identity::default()).await.unwrap().is_none());
    });
}

/// Data are durable before they are marked: without the mark they don't count.
#[test]
fn a_crash_before_the_mark_means_that_it_is_fetched_again() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("cache");
    on_runtime(async {
        let directory = directory(&path, 1 << 40);
        let file = file(&directory, &etag("a")).await;
        file.keep(0, data(0, 1));
        file.settle().await;
    });
    let raw = std::fs::OpenOptions::new().read(true).write(true).open(the_file(&path)).unwrap();
    raw.write_all_at(&[0], 4096).unwrap();
    on_runtime(async {
        let directory = directory(&path, 1 << 40);
        let again = file(&directory, &etag("a")).await;
        assert!(!holds(&again, 0));
    });
    // And a file that was made and nothing else.
    raw.set_len(0).unwrap();
    on_runtime(async {
        let directory = directory(&path, 1 << 40);
        let file = file(&directory, &etag("a")).await;
        assert!(!holds(&file, 0));
        file.keep(0, data(0, 1));
        file.settle().await;
        assert!(holds(&file, 0));
    });
    raw.write_all_at(b"something else", 0).unwrap();
    on_runtime(async {
        let directory = directory(&path, 1 << 40);
        let err = directory.file("http://h/x", SIZE, &etag("a")).await.err().unwrap();
        assert_eq!(err.kind(), ErrorKind::Corrupt);
    });
}

#[test]
fn the_longest_unused_goes_and_what_is_in_use_stays() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("cache");
    let fill = async |file: &CacheFile| {
        for block in 0..10 {
            file.keep(block * SHARE_BLOCK, data(block, 7));
        }
        file.settle().await;
    };
    on_runtime(async {
        // Room for one batch beside one file.
        let directory = directory(&path, (32 << 20) + 12 * SHARE_BLOCK);
        for name in ["a", "b"] {
            let file = file(&directory, &etag(name)).await;
            fill(&file).await;
            assert!(holds(&file, 9), "{name}");
        }
        assert_eq!(directory.files().unwrap().len(), 2, "what is there when b came was little");
        let used = file(&directory, &etag("b")).await;
        let third = file(&directory, &etag("c")).await;
        fill(&third).await;
        assert!(holds(&third, 9) && holds(&used, 9));
        let again = file(&directory, &etag("a")).await;
        assert!(!holds(&again, 9), "the oldest went");
        let fourth = file(&directory, &etag("d")).await;
        fill(&fourth).await;
        assert!(!holds(&fourth, 9), "there is no room, so it isn't kept");
    });
}

#[test]
fn a_directory_that_others_may_write_to_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    on_runtime(async {
        let engine = Engine::new(IoMode::Threads).unwrap();
        let err = CacheDir::open(&engine, scratch.path(), 1).err().unwrap();
        assert_eq!(err.kind(), ErrorKind::PermissionDenied);
    });
}
