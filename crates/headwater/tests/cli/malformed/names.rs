//! Images that name what they must not lead to, as backing file and as data file.

use super::case::Case;
use super::image::{Image, at};
use super::{Place, SECRET};

/// Names that lead out of the image's directory, to something that isn't a file, or to nothing; with what is said of them.
fn names(place: &Place) -> Vec<(&'static str, String, &'static str)> {
    let (forbidden, port) = (&place.forbidden, place.listeners.port());
    vec![
        (
            "json of a file",
            format!(r#"json:{{"driver":"raw","file.filename":"{forbidden}/{SECRET}"}}"#),
            "json:",
        ),
        ("json of a file beside it", r#"json:{"driver":"raw","file.filename":"beside.raw"}"#.into(), "json:"),
        (
            "json of a server",
            format!(
                r#"json:{{"driver":"nbd","server":{{"type":"inet","host":"127.0.0.1","port":"{port}"}}}}"#
            ),
            "json:",
        ),
        ("json that is none", "json:{".into(), "json:"),
        ("NBD server", format!("nbd://127.0.0.1:{port}/x"), "network"),
        ("NBD server in QEMU's old spelling", format!("nbd:127.0.0.1:{port}"), "protocol"),
        ("NBD server on a socket", format!("nbd+unix:///x?socket={}", place.socket), "network"),
        ("web server", format!("http://127.0.0.1:{port}/x"), "network"),
        ("web server with TLS", format!("https://127.0.0.1:{port}/x"), "network"),
        ("remote shell", "ssh://127.0.0.1/x".into(), "network"),
        ("file with a protocol", format!("file:{forbidden}/{SECRET}"), "outside"),
        ("file beside it with a protocol", "file:beside.raw".into(), "protocol"),
        ("URI of a file", format!("file://{forbidden}/{SECRET}"), "outside"),
        ("debugging protocol", "blkdebug::beside.raw".into(), "protocol"),
        ("directory as a FAT disk", format!("fat:rw:{forbidden}"), "protocol"),
        ("host device", "host_device:/dev/full".into(), "protocol"),
        ("no device at all", "null-co://".into(), "null-co"),
        ("device", "/dev/full".into(), "device"),
        ("device up the tree", format!("{}/dev/full", "../".repeat(30)), "device"),
        ("password file", "/etc/passwd".into(), "outside"),
        ("file of the process", "/proc/self/environ".into(), "outside"),
        ("open file of the process", "/proc/self/fd/0".into(), "device"),
        ("absolute path", format!("{forbidden}/{SECRET}"), "outside"),
        ("path that climbs", format!("../forbidden/{SECRET}"), "outside"),
        ("path that descends and climbs", format!("below/../../forbidden/{SECRET}"), "outside"),
        ("path that climbs behind slashes", format!(".//..//forbidden//{SECRET}"), "outside"),
        ("symbolic link", "link.raw".into(), "outside"),
        ("symbolic link of a directory", format!("linked/{SECRET}"), "outside"),
        ("symbolic link in a circle", "circle".into(), "circle"),
        ("FIFO", "fifo".into(), "FIFO"),
        ("directory", "below".into(), "directory"),
        ("its own directory", ".".into(), "directory"),
        ("socket", "socket".into(), "socket"),
        ("file that is not there", "absent.raw".into(), "absent.raw"),
        ("name with a new line", "a\nheadwater: all is well".into(), "a\\nheadwater"),
        ("name with terminal codes", "\u{1b}[2Jx".into(), "x"),
        ("longest name", format!("{}x", "y/".repeat(511)), "y/y"),
        ("home directory", "~/x".into(), "~/x"),
        ("path of another system", r"\\server\share".into(), "server"),
    ]
}

pub(super) fn backings(place: &Place) -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, name, says) in names(place) {
        cases.push(Case::chain(format!("backing: {what}"), says, |image| {
            image.backing(&name, "raw");
        }));
    }
    for format in ["vmdk", "luks", "nbd", "file", "json:{}", "blkdebug", "../x", "RAW"] {
        cases.push(Case::chain(format!("backing of the format {format}"), format, |image| {
            image.backing("beside.raw", format);
        }));
    }
    // A guest that had a raw disk wrote a qcow2 header into it, with a name of its choice.
    let mut trap = Image::sound();
    trap.backing(&format!("{}/{SECRET}", place.forbidden), "raw");
    let case = Case::chain("backing of no format that looks like qcow2", "--allow-probed-format", |image| {
        image.backing("trap.raw", "");
    });
    cases.push(case.beside("trap.raw", &trap));
    let case = Case::harmless("backing of the format raw that looks like qcow2", |image| {
        image.backing("trap.raw", "raw");
    });
    cases.push(case.beside("trap.raw", &trap));
    let case = Case::chain("backing of which the backing leads out", "outside", |image| {
        image.backing("trap.raw", "qcow2");
    });
    cases.push(case.beside("trap.raw", &trap));
    let mut raw = Case::harmless("raw image that looks like qcow2", |image| {
        image.backing(&format!("{}/{SECRET}", place.forbidden), "raw");
    });
    raw.format = Some("raw");
    cases.push(raw);
    cases
}

pub(super) fn data_files(place: &Place) -> Vec<Case> {
    let mut cases = Vec::new();
    for (what, name, says) in names(place) {
        let case = Case::refused(format!("data file: {what}"), says, |image| {
            image.data_file(&name);
        });
        // A check has no use for the data.
        cases.push(case.but_its_tables_are_sound());
    }
    let case = Case::refused("data file that is the image", "circle", |image| {
        image.data_file("bad.qcow2");
    });
    cases.push(case.but_its_tables_are_sound());
    for (what, name, says) in
        [("no name", "", "malformed"), ("a zero in its name", "data.raw\0x", "malformed")]
    {
        let case = Case::refused(format!("data file with {what}"), says, |image| {
            image.data_file(name);
        });
        cases.push(case.but_its_tables_are_sound());
    }
    let case = Case::refused("data file that nobody names", "in which", |image| {
        image.data_file("data.raw").put32(at::EXTENSIONS, 0x1234);
    });
    cases.push(case.but_its_tables_are_sound());
    let case = Case::chain("data file that is the backing file", "circle", |image| {
        image.data_file("data.raw").backing("data.raw", "raw");
    });
    cases.push(case.beside("data.raw", &Image::of(&[3; 4096])));
    cases
}

pub(super) fn circles(place: &Place) -> Vec<Case> {
    let naming = |name: &str| {
        let mut image = Image::sound();
        image.backing(name, "qcow2");
        image
    };
    let mut cases = Vec::new();
    for name in ["bad.qcow2", "./bad.qcow2", "below/../bad.qcow2", "itself.qcow2"] {
        cases.push(Case::chain(format!("backing that is the image, as {name}"), "circle", |image| {
            image.backing(name, "qcow2");
        }));
    }
    let absolute = format!("{}/bad.qcow2", place.images);
    cases.push(Case::chain("backing that is the image, as an absolute path", "circle", |image| {
        image.backing(&absolute, "qcow2");
    }));
    let case = Case::chain("circle of two", "circle", |image| {
        image.backing("other.qcow2", "qcow2");
    });
    cases.push(case.beside("other.qcow2", &naming("bad.qcow2")));
    let case = Case::chain("circle below the image", "circle", |image| {
        image.backing("one.qcow2", "qcow2");
    });
    cases.push(case.beside("one.qcow2", &naming("two.qcow2")).beside("two.qcow2", &naming("one.qcow2")));
    let mut case = Case::chain("chain of 300 images", "200", |image| {
        image.backing("chain1.qcow2", "qcow2");
    });
    for n in 1..300 {
        // Just their headers: what a child of this process had at its peak is at least what this process had when it began.
        let image = naming(&format!("chain{}.qcow2", n + 1));
        case = case.beside(&format!("chain{n}.qcow2"), &Image::of(&image.bytes()[..8192]));
    }
    cases.push(case);
    cases
}
