//! Tests of new images, with qemu-img as the judge.

use super::*;
use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;
use std::process::Command;
use std::rc::Rc;

/// A new image in memory.
fn made(options: &CreateOptions) -> Result<Rc<MemoryNode>> {
    let file = MemoryNode::new("new.qcow2", b"what was here before".repeat(5000));
    create(&*file, options).now_or_never().expect("memory never waits")?;
    Ok(file)
}

/// What qemu-img prints for `args` and the image.
fn qemu_img(args: &[&str], image: &std::path::Path) -> String {
    // QEMU looks for data files in its own working directory.
    let dir = image.parent().expect("images lie in a directory");
    let out =
        Command::new("qemu-img").args(args).arg(image).current_dir(dir).output().expect("qemu-img runs");
    assert!(
        out.status.success(),
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn qemu_accepts_images_of_all_geometries() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.qcow2");
    for cluster_bits in [9, 12, 14, 16, 21] {
        for (version, refcount_bits, extended_l2) in
            [(2, 16, false), (3, 1, false), (3, 64, false), (3, 16, true)]
        {
            if extended_l2 && cluster_bits < 14 {
                continue;
            }
            for size in [0, 512, 1 << 20, 5_000_000_000, 100 << 30] {
                let mut options = CreateOptions::new(size);
                options.cluster_size = 1 << cluster_bits;
                (options.version, options.refcount_bits, options.extended_l2) =
                    (version, refcount_bits, extended_l2);
                std::fs::write(&path, made(&options).unwrap().contents()).unwrap();
                qemu_img(&["check", "-q"], &path);
                let info = qemu_img(&["info", "--output=json"], &path);
                for expected in [
                    format!("\"virtual-size\": {size},"),
                    format!("\"cluster-size\": {},", 1 << cluster_bits),
                    format!("\"refcount-bits\": {refcount_bits}"),
                    format!("\"compat\": \"{}\"", if version == 2 { "0.10" } else { "1.1" }),
                ] {
                    assert!(info.contains(&expected), "{options:?}: no {expected} in {info}");
                }
            }
        }
    }
}

#[test]
fn a_huge_overlay_is_small_and_names_its_backing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.qcow2");
    std::fs::write(dir.path().join("base.img"), b"x").unwrap();
    for (size, bytes) in [(1 << 40, 256 << 10), (16 << 40, 448 << 10)] {
        let mut options = CreateOptions::new(size);
        options.backing = Some(("base.img".to_owned(), Format::Raw));
        options.compression = Compression::Zstd;
        let contents = made(&options).unwrap().contents();
        assert_eq!(contents.len(), bytes);
        std::fs::write(&path, contents).unwrap();
        qemu_img(&["check", "-q"], &path);
        let info = qemu_img(&["info"], &path);
        for expected in ["backing file: base.img", "backing file format: raw", "compression type: zstd"] {
            assert!(info.contains(expected), "{info}");
        }
    }
}

#[test]
fn a_data_file_is_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.qcow2");
    std::fs::write(dir.path().join("disk.data"), vec![0; 1 << 20]).unwrap();
    let mut options = CreateOptions::new(1 << 20);
    options.data_file = Some("disk.data".to_owned());
    std::fs::write(&path, made(&options).unwrap().contents()).unwrap();
    assert!(qemu_img(&["info"], &path).contains("data file: disk.data"));
    qemu_img(&["check", "-q"], &path);
}

#[test]
fn odd_sizes_are_rounded_up() {
    let file = made(&CreateOptions::new(1000)).unwrap();
    let header = Header::parse(&file.contents(), "new.qcow2").unwrap();
    assert_eq!((header.size, header.l1_size), (1024, 1));
}

#[test]
fn impossible_images_are_refused_before_anything_is_lost() {
    let base = CreateOptions::new(1 << 30);
    let name = |n: usize| Some(("x".repeat(n), Format::Raw));
    for (options, expected) in [
        (CreateOptions { cluster_size: 1000, ..base.clone() }, "power of two"),
        (CreateOptions { cluster_size: 4 << 20, ..base.clone() }, "2 MiB"),
        (CreateOptions { version: 4, ..base.clone() }, "version 4"),
        (CreateOptions { refcount_bits: 3, ..base.clone() }, "3 bits"),
        (CreateOptions { version: 2, refcount_bits: 8, ..base.clone() }, "version 3"),
        (CreateOptions { version: 2, extended_l2: true, ..base.clone() }, "version 3"),
        (CreateOptions { extended_l2: true, cluster_size: 4096, ..base.clone() }, "16 KiB"),
        (CreateOptions { cluster_size: 512, size: 1 << 40, ..base.clone() }, "larger clusters"),
        (CreateOptions { size: u64::MAX, ..base.clone() }, "too large"),
        (CreateOptions { backing: name(1024), ..base.clone() }, "shorter name"),
        (CreateOptions { backing: name(600), cluster_size: 512, ..base.clone() }, "larger clusters"),
        (CreateOptions { backing: name(0), ..base.clone() }, "empty"),
    ] {
        let file = MemoryNode::new("new.qcow2", vec![7; 100]);
        let err = create(&*file, &options).now_or_never().expect("memory never waits").unwrap_err();
        assert_eq!(err.kind(), ErrorKind::InvalidInput);
        assert!(err.to_string().contains(expected) && err.to_string().contains("new.qcow2"), "{err}");
        assert_eq!(file.contents(), vec![7; 100]);
    }
}
