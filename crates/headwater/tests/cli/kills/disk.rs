//! The disk that is streamed into, with its source and the daemon's command line.

use super::log::Log;
use crate::common::http::{Fault, HttpServer};
use crate::common::*;
use rand::Rng;
use rand::rngs::StdRng;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Where the disk's data come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A raw file.
    File,
    /// An export of an NBD server.
    Nbd,
    /// An object behind an HTTP server.
    Http,
    /// A qcow2 layer over a raw file, of which the layer is streamed.
    Layer,
}

/// A server that ends with the disk.
#[expect(dead_code, reason = "they are held, not used")]
enum Server {
    None,
    Nbd(Background),
    Http(HttpServer),
}

/// See the module.
pub(crate) struct Disk {
    scratch: Scratch,
    origin: Origin,
    _server: Server,
    /// What the header calls the source.
    link: String,
    size: usize,
    /// What the disk held when it was last looked at.
    before: Vec<u8>,
    /// What guests have done since.
    logs: Vec<Log>,
}

impl Disk {
    /// Makes a source and an empty overlay over it.
    pub(crate) fn new(origin: Origin, rng: &mut StdRng) -> Self {
        let scratch = Scratch::new();
        // No multiple of a cluster.
        let size = 10 * MIB + 512 * rng.random_range(1..300);
        let raw = scratch.path("source.raw");
        make_raw(&raw, size, rng.random());
        let (server, link, format) = match origin {
            Origin::File => (Server::None, "source.raw".to_owned(), "raw"),
            Origin::Nbd => {
                // nbdkit 1.32 dies of an assertion when clients vanish in the middle of requests.
                let socket = scratch.path("far.sock");
                let args = ["--read-only", "--persistent", "--shared=0", "--format=raw", "--socket"];
                let server = Background::start("qemu-nbd", &[&args[..], &[&socket, &raw]].concat());
                wait_for_file(&socket);
                (Server::Nbd(server), format!("nbd+unix:///?socket={socket}"), "raw")
            }
            Origin::Http => {
                let server = HttpServer::start(read_file(&raw), Fault::None, Duration::from_millis(1));
                let url = server.url.clone();
                (Server::Http(server), url, "raw")
            }
            Origin::Layer => {
                let layer = scratch.path("layer.qcow2");
                tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "source.raw", "-F", "raw", &layer]);
                for part in 0..5 {
                    let write = format!("write -P {} {}k 700k", part + 1, 333 + 2000 * part);
                    tool("qemu-io", &["-c", &write, &layer]);
                }
                (Server::None, "layer.qcow2".to_owned(), "qcow2")
            }
        };
        let options =
            ["cluster_size=64k", "cluster_size=4k", "extended_l2=on,cluster_size=64k", "cluster_size=512"];
        let options = options[rng.random_range(0..options.len())];
        println!("a disk of {size} bytes with {options} over {link}");
        let disk = scratch.path("disk.qcow2");
        let (name, bytes) = (link.as_str(), size.to_string());
        // Without opening the source: not every qemu-img speaks HTTP.
        tool(
            "qemu-img",
            &["create", "-q", "-u", "-f", "qcow2", "-o", options, "-b", name, "-F", format, &disk, &bytes],
        );
        let size = usize::try_from(size).expect("it fits in memory");
        let mut this =
            Self { scratch, origin, _server: server, link, size, before: Vec::new(), logs: Vec::new() };
        this.before = this.contents();
        this
    }

    /// The image.
    pub(crate) fn path(&self) -> String {
        self.scratch.path("disk.qcow2")
    }

    /// Where the disk is served, as `disk`.
    pub(crate) fn socket(&self) -> String {
        self.scratch.path("nbd.sock")
    }

    /// Where it takes commands.
    pub(crate) fn monitor(&self) -> String {
        self.scratch.path("qmp.sock")
    }

    /// The name of the base that stays, as arguments have it.
    pub(crate) fn base(&self) -> Option<String> {
        (self.origin == Origin::Layer).then(|| self.scratch.path("source.raw"))
    }

    /// The records that there are.
    pub(crate) fn records(&self) -> Vec<String> {
        // A daemon that was killed early has not made it.
        let entries = std::fs::read_dir(self.scratch.path("state")).into_iter().flatten();
        let names = entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned());
        names.filter(|name| name != ".lock").collect()
    }

    /// Starts the daemon, always in the same way.
    pub(crate) fn start(&self) -> Running {
        let blockdev = format!(
            "driver=qcow2,node-name=disk,discard=unmap,file.driver=file,file.filename={}",
            self.path()
        );
        let server = format!("addr.type=unix,addr.path={}", self.socket());
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", self.monitor());
        let state = self.scratch.path("state");
        let mut line =
            vec!["daemon", "--state-dir", &state, "--blockdev", &blockdev, "--nbd-server", &server];
        line.extend(["--export", "nbd,id=export,node-name=disk,name=disk,writable=on"]);
        line.extend(["--chardev", &chardev, "--monitor", "qmp"]);
        if matches!(self.origin, Origin::Nbd | Origin::Http) {
            line.extend(["--allow-backing", &self.link]);
        }
        Running::start(&line)
    }

    /// Starts `headwater stream` on it, always in the same way. Its source must be a file.
    pub(crate) fn stream(&self, rate: u64) -> Running {
        let (source, disk, rate) = (self.scratch.path("source.raw"), self.path(), rate.to_string());
        let serve = format!("nbd+unix:///disk?socket={}", self.socket());
        let line =
            ["stream", &source, &disk, "--serve", &serve, "--control", &self.monitor(), "--rate", &rate];
        Running::start(&line)
    }

    /// What lies beside it that `headwater stream` remembers.
    pub(crate) fn remembered(&self) -> Vec<String> {
        let directory = self.scratch.path("");
        let entries = std::fs::read_dir(directory).expect("the directory");
        let names = entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned());
        names.filter(|name| name.contains(".headwater")).collect()
    }

    /// True as long as the header names the source.
    pub(crate) fn is_linked(&self) -> bool {
        self.header_link().as_deref() == Some(&self.link)
    }

    /// The name of the backing file in the header.
    fn header_link(&self) -> Option<String> {
        let file = File::open(self.path()).expect("open");
        let mut head = [0; 20];
        file.read_exact_at(&mut head, 0).expect("read");
        let offset = u64::from_be_bytes(head[8..16].try_into().expect("8 bytes"));
        let len = u32::from_be_bytes(head[16..].try_into().expect("4 bytes"));
        let mut name = vec![0; len as usize];
        file.read_exact_at(&mut name, offset).expect("read");
        (offset != 0).then(|| String::from_utf8(name).expect("a plain name"))
    }

    /// What it held when it was last looked at.
    pub(crate) fn before(&self) -> &Vec<u8> {
        &self.before
    }

    /// Notes what guests have done until the daemon died.
    pub(crate) fn used(&mut self, logs: Vec<Log>) {
        self.logs = logs;
    }

    /// Looks at what is on the disk, with the daemon gone: it must be sound, and hold what the guests' logs allow.
    pub(crate) fn look(&mut self) {
        assert_no_errors(&self.path());
        let found = self.contents();
        let mut expected = self.before.clone();
        for (number, log) in self.logs.drain(..).enumerate() {
            let changed = log.check(&self.before, &found);
            let changed =
                changed.unwrap_or_else(|why| panic!("what guest {number} was told is not true: {why}"));
            // That was compared.
            for range in changed {
                expected[range.clone()].copy_from_slice(&found[range]);
            }
        }
        let wrong = expected.iter().zip(&found).position(|(a, b)| a != b);
        if let Some(at) = wrong {
            panic!("byte {at}, which nobody wrote, was {:#04x} and is {:#04x}", expected[at], found[at]);
        }
        self.before = found;
    }

    /// All bytes, by way of QEMU, which reads the source from its file.
    fn contents(&self) -> Vec<u8> {
        let file = |name: &str| format!(r#"{{"driver":"file","filename":"{}"}}"#, self.scratch.path(name));
        let raw = format!(r#"{{"driver":"raw","file":{}}}"#, file("source.raw"));
        let layer = format!(r#"{{"driver":"qcow2","backing":{raw},"file":{}}}"#, file("layer.qcow2"));
        let backing = match (self.is_linked(), self.origin) {
            (true, Origin::Layer) => layer,
            (true, _) | (false, Origin::Layer) => raw,
            (false, _) => "null".to_owned(),
        };
        let name = format!(r#"json:{{"driver":"qcow2","backing":{backing},"file":{}}}"#, file("disk.qcow2"));
        let out = self.scratch.path("contents.raw");
        tool("qemu-img", &["convert", "-O", "raw", &name, &out]);
        let bytes = read_file(&out);
        assert_eq!(bytes.len(), self.size);
        bytes
    }
}
