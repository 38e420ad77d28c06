//! Tests of opening chains: what is followed, what is refused, and what the errors say.

use super::*;
use crate::qcow2::create::{CreateOptions, create};
use futures_util::FutureExt;
use headwater_block::Buffer;
use headwater_block::WriteFlags;
use headwater_block::memory::MemoryNode;
use std::fs;
use std::future::ready;
use std::path::Path;

/// The result of a future that never has to wait, as those over memory.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory never waits")
}

/// Opens copies of local files in memory.
struct Copies;

impl ProtocolOpener for Copies {
    fn open<'a>(&'a self, name: &'a str, how: ProtocolOptions) -> LocalFuture<'a, Result<Rc<dyn Node>>> {
        let node = fs::read(name).map_err(|err| Error::from_io(err, format!("open {name}"))).map(|bytes| {
            let node = MemoryNode::new(name, bytes);
            node.set_read_only(how.read_only);
            node as Rc<dyn Node>
        });
        Box::pin(ready(node))
    }
}

/// A directory with images.
struct Yard(tempfile::TempDir);

impl Yard {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().canonicalize().unwrap().join(name).to_str().unwrap().to_owned()
    }

    /// Makes a qcow2 image of 1 MiB whose first bytes are `text`.
    fn image(&self, name: &str, text: &str, backing: Option<(&str, Format)>) {
        let file = MemoryNode::new(name, Vec::new());
        let mut options = CreateOptions::new(1 << 20);
        options.backing = backing.map(|(name, format)| (name.to_owned(), format));
        now(create(&*file, &options)).unwrap();
        if !text.is_empty() {
            let node =
                now(Qcow2Node::open(file.clone(), Children::default(), Qcow2Options::default())).unwrap();
            let mut cluster = vec![0; 65536];
            cluster[..text.len()].copy_from_slice(text.as_bytes());
            now(node.write(0, Buffer::copy_of(&cluster), WriteFlags::default())).unwrap();
            now(node.close()).unwrap();
        }
        fs::write(self.path(name), file.contents()).unwrap();
    }

    /// Removes the record of the backing's format.
    fn forget_format(&self, name: &str) {
        let mut bytes = fs::read(self.path(name)).unwrap();
        let extension = crate::qcow2::extensions::BACKING_FORMAT.to_be_bytes();
        let at = bytes.windows(4).position(|window| window == extension).expect("it is recorded");
        bytes[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
        fs::write(self.path(name), bytes).unwrap();
    }

    fn open(&self, name: &str, options: &OpenOptions) -> Result<OpenedImage> {
        now(open_image(&self.path(name), options, &Copies))
    }

    /// The message of an error that mentions all of `parts`.
    fn refused(&self, name: &str, kind: ErrorKind, parts: &[&str]) {
        let err = self.open(name, &OpenOptions::default()).err().expect(name);
        assert_eq!(err.kind(), kind, "{err}");
        for part in parts {
            assert!(err.to_string().contains(part), "no {part:?} in: {err}");
        }
    }
}

fn text_of(image: &OpenedImage) -> String {
    let bytes = now(image.node.read(0, BufferMut::new(10))).unwrap();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}

#[test]
fn a_chain_is_followed_to_its_end() {
    let yard = Yard::new();
    fs::write(yard.path("base.raw"), b"from raw\0\0").unwrap();
    yard.image("mid.qcow2", "", Some(("base.raw", Format::Raw)));
    yard.image("disk.qcow2", "", Some(("mid.qcow2", Format::Qcow2)));
    let image = yard.open("disk.qcow2", &OpenOptions::default()).unwrap();
    assert_eq!(text_of(&image), "from raw");
    let names: Vec<_> = image.layers.iter().map(|layer| (layer.name(), layer.format)).collect();
    let expected = [("disk.qcow2", Format::Qcow2), ("mid.qcow2", Format::Qcow2), ("base.raw", Format::Raw)];
    assert_eq!(names, expected.map(|(name, format)| (yard.path(name), format)));
    let mid = image.node.backing().expect("mid.qcow2");
    assert!(!image.node.is_read_only() && mid.is_read_only());
    assert!(mid.backing().expect("base.raw").is_read_only());
    now(image.node.close()).unwrap();
    now(image.close_below()).unwrap();
}

#[test]
fn the_operator_decides_what_is_below() {
    let yard = Yard::new();
    yard.image("disk.qcow2", "", Some(("gone.raw", Format::Raw)));
    let alone = OpenOptions { below: Below::Nothing, ..OpenOptions::default() };
    assert_eq!(text_of(&yard.open("disk.qcow2", &alone).unwrap()), "");
    let other = MemoryNode::new("other", b"other\0\0\0\0\0".to_vec());
    let given = OpenOptions { below: Below::Node(other), ..OpenOptions::default() };
    assert_eq!(text_of(&yard.open("disk.qcow2", &given).unwrap()), "other");
    let raw = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    assert_eq!(yard.open("disk.qcow2", &raw).unwrap().node.driver(), "raw");
}

#[test]
fn a_format_that_nobody_recorded_is_believed_only_if_it_is_harmless() {
    let yard = Yard::new();
    fs::write(yard.path("base.raw"), b"raw\0\0\0\0\0\0\0").unwrap();
    yard.image("base.qcow2", "secret", None);
    for base in ["base.raw", "base.qcow2"] {
        yard.image("disk.qcow2", "", Some((base, Format::Qcow2)));
        yard.forget_format("disk.qcow2");
        if base == "base.raw" {
            assert_eq!(text_of(&yard.open("disk.qcow2", &OpenOptions::default()).unwrap()), "raw");
        }
    }
    let remedies = ["disk.qcow2", "base.qcow2", "rebase -u -F qcow2", "--allow-probed-format"];
    yard.refused("disk.qcow2", ErrorKind::NotAllowed, &remedies);
    let mut options = OpenOptions::default();
    options.trust.allow_probed_format = true;
    assert_eq!(text_of(&yard.open("disk.qcow2", &options).unwrap()), "secret");
    // A recorded format holds, whatever the bytes look like.
    yard.image("disk.qcow2", "", Some(("base.qcow2", Format::Raw)));
    assert_eq!(&text_of(&yard.open("disk.qcow2", &OpenOptions::default()).unwrap())[..3], "QFI");
}

#[test]
fn errors_name_every_step() {
    let yard = Yard::new();
    yard.image("mid.qcow2", "", Some(("gone.raw", Format::Raw)));
    yard.image("disk.qcow2", "", Some(("mid.qcow2", Format::Qcow2)));
    yard.refused(
        "disk.qcow2",
        ErrorKind::NotFound,
        &["disk.qcow2: its backing file: ", "mid.qcow2", "gone.raw"],
    );
    yard.image("mid.qcow2", "", Some(("/etc/passwd", Format::Raw)));
    let parts =
        ["disk.qcow2: its backing file: ", "mid.qcow2: its backing file", "/etc/passwd", "--allow-backing"];
    yard.refused("disk.qcow2", ErrorKind::NotAllowed, &parts);
    fs::write(yard.path("mid.qcow2"), b"no image at all").unwrap();
    yard.refused("disk.qcow2", ErrorKind::Corrupt, &["disk.qcow2: its backing file: ", "mid.qcow2"]);
    yard.refused("missing.qcow2", ErrorKind::NotFound, &["missing.qcow2"]);
}

#[test]
fn circles_are_refused() {
    let yard = Yard::new();
    yard.image("self.qcow2", "", Some(("self.qcow2", Format::Qcow2)));
    yard.refused("self.qcow2", ErrorKind::Corrupt, &["self.qcow2", "circle"]);
    yard.image("a.qcow2", "", Some(("b.qcow2", Format::Qcow2)));
    yard.image("b.qcow2", "", Some(("a.qcow2", Format::Qcow2)));
    yard.refused("a.qcow2", ErrorKind::Corrupt, &["a.qcow2: its backing file", "b.qcow2", "circle"]);
    // Other names don't hide it.
    std::os::unix::fs::symlink("a.qcow2", Path::new(&yard.path("link.qcow2"))).unwrap();
    yard.image("b.qcow2", "", Some(("link.qcow2", Format::Qcow2)));
    yard.refused("a.qcow2", ErrorKind::Corrupt, &["circle"]);
    fs::hard_link(yard.path("self.qcow2"), yard.path("hard.qcow2")).unwrap();
    yard.refused("hard.qcow2", ErrorKind::Corrupt, &["circle"]);
}

#[test]
fn chains_have_a_limit() {
    let yard = Yard::new();
    yard.image("0", "bottom", None);
    for i in 1..=MAX_DEPTH {
        yard.image(&i.to_string(), "", Some((&(i - 1).to_string(), Format::Qcow2)));
    }
    let top = (MAX_DEPTH - 1).to_string();
    assert_eq!(text_of(&yard.open(&top, &OpenOptions::default()).unwrap()), "bottom");
    yard.refused(&MAX_DEPTH.to_string(), ErrorKind::Corrupt, &["201 of the chain"]);
}

#[test]
fn names_that_lead_elsewhere_and_formats_that_are_foreign_are_refused() {
    let yard = Yard::new();
    for name in
        ["json:{}", "nbd://h/x", "http://h/x", "/dev/null", "../x/../../etc/passwd", "/etc/passwd", "file:x"]
    {
        yard.image("disk.qcow2", "", Some((name, Format::Raw)));
        let err = yard.open("disk.qcow2", &OpenOptions::default()).err().expect(name);
        assert!(matches!(err.kind(), ErrorKind::NotAllowed | ErrorKind::NotFound), "{name}: {err}");
    }
    fs::write(yard.path("base.vmdk"), b"KDMV and so on").unwrap();
    yard.image("disk.qcow2", "", Some(("base.vmdk", Format::Qcow2)));
    yard.forget_format("disk.qcow2");
    yard.refused("disk.qcow2", ErrorKind::Unsupported, &["base.vmdk", "VMDK", "raw explicitly"]);
}

#[test]
fn a_data_file_is_opened_and_its_name_is_not_trusted() {
    let yard = Yard::new();
    fs::write(yard.path("disk.data"), vec![0; 1 << 20]).unwrap();
    for (name, expected) in
        [("disk.data", None), ("/etc/passwd", Some("its data file")), ("disk.qcow2", Some("circle"))]
    {
        let file = MemoryNode::new("disk.qcow2", Vec::new());
        let options = CreateOptions { data_file: Some(name.to_owned()), ..CreateOptions::new(1 << 20) };
        now(create(&*file, &options)).unwrap();
        fs::write(yard.path("disk.qcow2"), file.contents()).unwrap();
        match (yard.open("disk.qcow2", &OpenOptions::default()), expected) {
            (Ok(image), None) => assert!(image.layers[0].data_file.is_some()),
            (Err(err), Some(text)) => assert!(err.to_string().contains(text), "{err}"),
            (result, _) => panic!("{name}: {:?}", result.err()),
        }
    }
}
