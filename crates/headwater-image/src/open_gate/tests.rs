//! Tests of what images may name, on real directories.

use super::*;
use std::fs;
use std::os::unix::fs::symlink;

/// A directory `images` with an image and a base, and a secret beside it.
struct Yard {
    dir: tempfile::TempDir,
}

impl Yard {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("images/sub")).unwrap();
        for file in
            ["images/disk.qcow2", "images/base.img", "images/sub/deep.img", "images/a:b.img", "secret"]
        {
            fs::write(dir.path().join(file), b"x").unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    fn admit(&self, name: &str, trust: &Trust) -> Result<Location> {
        admit(&Location::Path(self.path("images/disk.qcow2")), name, Role::Backing, trust)
    }

    /// The message of a refusal that names the image, the name and the remedy.
    fn refused(&self, name: &str) -> String {
        let err = self.admit(name, &Trust::default()).expect_err(name);
        assert_eq!(err.kind(), ErrorKind::NotAllowed, "{name}: {err}");
        let text = err.to_string();
        assert!(text.contains("disk.qcow2") && text.contains("backing file"), "{text}");
        assert!(text.contains(&format!("{name:?}")) && text.contains("--allow-backing"), "{text}");
        text
    }
}

#[test]
fn files_that_resolve_inside_the_directory_are_opened() {
    let yard = Yard::new();
    symlink("sub/deep.img", yard.path("images/link.img")).unwrap();
    for (name, leads_to) in [
        ("base.img", "images/base.img"),
        ("./base.img", "images/base.img"),
        ("./a:b.img", "images/a:b.img"),
        ("sub/deep.img", "images/sub/deep.img"),
        ("sub/../base.img", "images/base.img"),
        ("link.img", "images/sub/deep.img"),
    ] {
        let location = yard.admit(name, &Trust::default()).expect(name);
        assert_eq!(location, Location::Path(yard.path(leads_to)), "{name}");
    }
    for nothing in ["null-co://", "null-aio://"] {
        assert_eq!(yard.admit(nothing, &Trust::default()).unwrap(), Location::Uri(nothing.to_owned()));
    }
    let absolute = yard.path("images/base.img");
    for prefix in ["", "file:", "file://"] {
        let name = format!("{prefix}{}", absolute.display());
        assert_eq!(yard.admit(&name, &Trust::default()).unwrap(), Location::Path(absolute.clone()), "{name}");
    }
}

#[test]
fn paths_that_lead_outside_are_refused() {
    let yard = Yard::new();
    symlink("../secret", yard.path("images/innocent.img")).unwrap();
    symlink("..", yard.path("images/up")).unwrap();
    for name in [
        "../secret",
        "sub/../../secret",
        "innocent.img",
        "up/secret",
        "/etc/passwd",
        "file:/etc/passwd",
        "file:///etc/passwd",
    ] {
        assert!(yard.refused(name).contains("outside the image's directory"));
    }
    // A directory whose name merely begins alike is outside, too.
    fs::create_dir(yard.path("images2")).unwrap();
    fs::write(yard.path("images2/base.img"), b"x").unwrap();
    yard.refused("../images2/base.img");
}

#[test]
fn protocols_and_things_that_are_no_files_are_refused() {
    let yard = Yard::new();
    for name in [
        "nbd://host/disk",
        "http://host/x",
        "https://host/x",
        "nbd:unix:/tmp/s",
        "file:base.img",
        "ssh://h/x",
        "a:b.img",
        "fat:/etc",
    ] {
        yard.refused(name);
    }
    assert!(yard.refused(r#"json:{"driver":"file","filename":"/etc/passwd"}"#).contains("json:"));
    let fifo = yard.path("images/fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert!(yard.refused("fifo").contains("a FIFO"));
    assert!(yard.refused("sub").contains("a directory"));
    assert!(yard.refused("/dev/null").contains("a device"));
    symlink("/dev/zero", yard.path("images/zero.img")).unwrap();
    assert!(yard.refused("zero.img").contains("a device"));

    let err = yard.admit("gone.img", &Trust::default()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotFound);
    assert!(err.to_string().contains("gone.img") && err.to_string().contains("disk.qcow2"), "{err}");
    for malformed in ["", "base\0.img"] {
        assert_eq!(yard.admit(malformed, &Trust::default()).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn the_operator_allows_paths_and_uris() {
    let yard = Yard::new();
    let mut trust = Trust { allow: vec![yard.path("secret")], ..Trust::default() };
    assert!(yard.admit("../secret", &trust).is_ok());
    trust.allow = vec![yard.path("")];
    assert!(yard.admit("../secret", &trust).is_ok(), "a directory allows what is below it");
    // Even then a device or FIFO must not be opened.
    trust.allow = vec![PathBuf::from("/dev")];
    assert!(yard.admit("/dev/null", &trust).is_err());
    trust.allow = vec![PathBuf::from("/dev/null")];
    assert!(yard.admit("/dev/null", &trust).is_err());

    trust.allow_source("nbd+unix:///export?socket=/run/x");
    assert!(yard.admit("nbd+unix:///export?socket=/run/x", &trust).is_ok());
    assert!(yard.admit("nbd+unix:///export?socket=/run/other", &trust).is_err());
    trust.allow_source("http://host/images/");
    assert!(yard.admit("http://host/images/a/b.img", &trust).is_ok());
    for name in [
        "http://host/images/../x",
        "http://host/images/%2e%2e/x",
        "http://host/other",
        "http://host/images/a?b",
    ] {
        assert!(yard.admit(name, &trust).is_err(), "{name}");
    }
}

#[test]
fn names_in_a_remote_image_start_from_its_uri() {
    let yard = Yard::new();
    let image = Location::Uri("https://host/images/disk.qcow2".to_owned());
    let mut trust = Trust::default();
    let err = admit(&image, "base.img", Role::Backing, &trust).unwrap_err();
    assert!(err.to_string().contains("https://host/images/base.img"), "{err}");
    trust.allow_source("https://host/images/base.img");
    let location = admit(&image, "base.img", Role::Backing, &trust).unwrap();
    assert_eq!(location, Location::Uri("https://host/images/base.img".to_owned()));
    // No local file is near a remote image.
    let local = yard.path("images/base.img");
    assert_eq!(
        admit(&image, local.to_str().unwrap(), Role::Backing, &trust).unwrap_err().kind(),
        ErrorKind::NotAllowed
    );
}

#[test]
fn operators_name_uris_by_their_slashes() {
    assert_eq!(Location::of_operator("a:b.img"), Location::Path(PathBuf::from("a:b.img")));
    assert_eq!(Location::of_operator("./x://y"), Location::Path(PathBuf::from("./x://y")));
    assert_eq!(Location::of_operator("nbd://h"), Location::Uri("nbd://h".to_owned()));
}
