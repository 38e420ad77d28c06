//! The names that an image may give for its backing and its data file.
//!
//! Input: a byte that chooses what the operator allows and where the image is; a byte with the length of the name, the name; then, if the byte says so,
//! the image itself, which is opened with everything that it names.
//!
//! Asserted: what is admitted lies in the image's directory or is what the operator allowed, is a regular file, and no name of a protocol;
//! nothing else is opened, whatever an image says.

use crate::Target;
use futures_util::FutureExt;
use headwater_block::memory::MemoryNode;
use headwater_block::{Error, ErrorKind, LocalFuture, Node, Result};
use headwater_image::open_gate::{Location, Role, Trust, admit};
use headwater_image::qcow2::create::CreateOptions;
use headwater_image::{Format, OpenOptions, ProtocolOpener, ProtocolOptions, open_image};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::OnceLock;

/// See the module.
pub const TARGET: Target = Target { name: "names", run, seeds, max_len: 2048 };

/// URIs that the operator allows, if any.
const ALLOWED_URI: &str = "nbd://host/export";
const ALLOWED_BELOW: &str = "http://host/images/";

/// A directory with images, links that lead out of it and things that aren't files, made once for the process.
fn yard() -> &'static Path {
    static YARD: OnceLock<PathBuf> = OnceLock::new();
    YARD.get_or_init(|| make_yard().expect("a directory can be made"))
}

fn make_yard() -> std::io::Result<PathBuf> {
    // Its name is short and known, so that an input means the same in every process.
    let yard = std::env::temp_dir().join(format!("headwater-fuzz-names-{}", std::process::id()));
    let _ = fs::remove_dir_all(&yard);
    fs::create_dir_all(yard.join("images/sub"))?;
    fs::create_dir_all(yard.join("images2"))?;
    let files = [
        "images/disk.qcow2",
        "images/base.img",
        "images/sub/deep.img",
        "images/a:b",
        "images2/base.img",
        "secret",
    ];
    for file in files {
        fs::write(yard.join(file), b"x")?;
    }
    symlink("../secret", yard.join("images/out"))?;
    symlink("..", yard.join("images/up"))?;
    symlink("sub/deep.img", yard.join("images/in"))?;
    symlink("loop", yard.join("images/loop"))?;
    symlink("/dev/null", yard.join("images/null"))?;
    yard.canonicalize()
}

fn run(data: &[u8]) {
    let Some((&[choice, len], rest)) = data.split_first_chunk() else { return };
    let (name, image) = rest.split_at(usize::from(len).min(rest.len()));
    let yard = yard();
    // `@` stands for the yard, whose name differs.
    let name = String::from_utf8_lossy(name).replace('@', &yard.to_string_lossy());
    let mut trust = Trust::default();
    if choice & 1 != 0 {
        trust.allow_source(&yard.join("images2").to_string_lossy());
    }
    if choice & 2 != 0 {
        trust.allow_source(ALLOWED_URI);
        trust.allow_source(ALLOWED_BELOW);
    }
    let at = match choice & 12 {
        0 => Location::Path(yard.join("images/disk.qcow2")),
        4 => Location::Path(yard.join("images/sub/../disk.qcow2")),
        8 => Location::Uri("http://host/images/disk.qcow2".to_owned()),
        _ => Location::Path(yard.join("images/sub/deep.img")),
    };
    let directory = match choice & 12 {
        12 => yard.join("images/sub"),
        8 => yard.join("nowhere"),
        _ => yard.join("images"),
    };
    let role = if choice & 16 == 0 { Role::Backing } else { Role::DataFile };
    match admit(&at, &name, role, &trust) {
        Ok(location) => check(&location, &directory, &trust),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    if choice & 32 != 0 {
        open(image, trust);
    }
}

fn check(location: &Location, directory: &Path, trust: &Trust) {
    match location {
        Location::Path(path) => {
            assert_eq!(path.canonicalize().ok().as_ref(), Some(path), "not resolved");
            assert!(path.metadata().is_ok_and(|metadata| metadata.is_file()), "{path:?} is no file");
            let allowed = trust.allow.iter().any(|allowed| path.starts_with(allowed));
            assert!(path.starts_with(directory) || allowed, "{path:?} was admitted");
        }
        Location::Uri(uri) => {
            assert!(!trust.allow_uris.is_empty(), "{uri:?} was admitted");
            let below = uri.strip_prefix(ALLOWED_BELOW).filter(|rest| !rest.contains(['?', '#', '%', '\\']));
            let below = below.filter(|rest| rest.split('/').all(|part| part != ".."));
            assert!(uri == ALLOWED_URI || below.is_some(), "{uri:?} was admitted");
        }
    }
}

/// Opens what it is told to, if it may be told that.
struct Opener {
    trust: Trust,
}

impl ProtocolOpener for Opener {
    fn open<'a>(&'a self, name: &'a str, _how: ProtocolOptions) -> LocalFuture<'a, Result<Rc<dyn Node>>> {
        Box::pin(async move {
            let location = Location::of_operator(name);
            if !name.ends_with("/images/fuzzed.qcow2") {
                check(&location, &yard().join("images"), &self.trust);
            }
            let bytes = fs::read(name).map_err(|error| Error::from_io(error, name))?;
            Ok(MemoryNode::new(name, bytes) as Rc<dyn Node>)
        })
    }
}

fn open(image: &[u8], trust: Trust) {
    let path = yard().join("images/fuzzed.qcow2");
    fs::write(&path, image).expect("it can be written");
    let options = OpenOptions { trust: trust.clone(), ..OpenOptions::default() };
    let name = path.to_string_lossy();
    let opened = open_image(&name, &options, &Opener { trust }).now_or_never().expect("memory never waits");
    match opened {
        Ok(opened) => assert!(opened.layers.len() <= 3, "{} layers", opened.layers.len()),
        Err(error) => {
            assert!(
                error.to_string().contains("fuzzed.qcow2") || error.kind() == ErrorKind::NotFound,
                "{error}"
            )
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let names = [
        "base.img",
        "./a:b",
        "sub/deep.img",
        "sub/../base.img",
        "in",
        "@/images/base.img",
        "../secret",
        "out",
        "up/secret",
        "loop",
        "null",
        "/etc/passwd",
        "@/images2/base.img",
        "file:base.img",
        "nbd://host/export",
        "nbd+unix:///x?socket=s",
        "http://host/images/a.img",
        "http://host/images/../x",
        "json:{\"driver\":\"file\"}",
        "//host/x",
        "base.img\0",
        "\u{e9}",
    ];
    let mut seeds = Vec::new();
    for (i, name) in names.iter().enumerate() {
        seeds.push([&[i as u8 % 32, name.len() as u8][..], name.as_bytes()].concat());
        if i % 4 == 0 {
            let backing = Some(((*name).replace('\0', "").replace('@', "."), Format::Raw));
            let data_file = (i % 8 == 0).then(|| "in".to_owned());
            let options =
                CreateOptions { cluster_size: 512, backing, data_file, ..CreateOptions::new(1 << 10) };
            let mut image = super::image::created(&options);
            image.truncate(1600);
            seeds.push([&[32 | 3, 0][..], &image].concat());
        }
    }
    seeds
}
