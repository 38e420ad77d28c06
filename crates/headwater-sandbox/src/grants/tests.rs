//! Grants over a real directory: what a word gives, and what it doesn't.

use super::*;
use rustix::fs::OFlags;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

const READ: OFlags = OFlags::RDONLY;
const WRITE: OFlags = OFlags::RDWR;
const MAKE: OFlags = OFlags::RDWR.union(OFlags::CREATE).union(OFlags::EXCL);
const LIST: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY);

struct Scene {
    directory: tempfile::TempDir,
    grants: Grants,
}

impl Scene {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path().canonicalize().unwrap();
        for sub in ["other", "state", "certs"] {
            fs::create_dir(here.join(sub)).unwrap();
        }
        for file in ["disk", "base", "other/secret", "state/job", "certs/ca.pem"] {
            fs::write(here.join(file), file).unwrap();
        }
        Self { directory, grants: Grants::new(here) }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().canonicalize().unwrap().join(name)
    }

    fn may(&mut self, name: &str, flags: OFlags) -> bool {
        let path = self.grants.absolute(Path::new(name));
        self.grants.open(&path, flags).is_ok()
    }
}

#[test]
fn nothing_is_granted_before_a_word_was_said() {
    let mut scene = Scene::new();
    for name in ["disk", "other/secret", "/etc/shadow", "/proc/self/mem", "/dev/sda", "/", "", "/dev/fd/0"] {
        for flags in [READ, WRITE, MAKE, LIST] {
            assert!(!scene.may(name, flags), "{name} {flags:?}");
        }
    }
    let path = scene.at("disk");
    assert!(scene.grants.remove(&path).is_err());
    assert!(scene.grants.bind(&Address::Path(path.clone())).is_err());
    assert!(scene.grants.connect(&Address::Path(path)).is_err());
    assert!(scene.grants.connect(&Address::Abstract(b"x".to_vec())).is_err());
}

#[test]
fn a_file_is_replaced_by_one_that_is_made_beside_it_and_by_no_other() {
    let mut scene = Scene::new();
    scene.grants.hear(Word::Replaced("other/trace".into()));
    let at = |name: &str| scene.at(name);
    let (trace, new, other) = (at("other/trace"), at("other/.trace.77.new"), at("other/secret"));
    assert_eq!(new_name(&trace, 77).as_ref(), Some(&new));
    assert!(scene.may("other/.trace.77.new", MAKE) && scene.may("other/.trace.1.new", WRITE));
    for name in
        ["other/trace", "other/.trace.x.new", "other/.trace.new", ".trace.77.new", "other/.secret.77.new"]
    {
        assert!(!scene.may(name, MAKE), "{name}");
    }
    assert_eq!(scene.grants.rename(&new, &trace), Ok((new.clone(), trace.clone())));
    assert!(scene.grants.rename(&new, &other).is_err());
    assert!(scene.grants.rename(&other, &trace).is_err());
    assert!(scene.grants.rename(&trace, &new).is_err());
    assert!(scene.grants.remove(&new).is_ok() && scene.grants.remove(&trace).is_err());
}

#[test]
fn a_file_of_credentials_is_read_and_no_more() {
    let mut scene = Scene::new();
    scene.grants.hear(Word::Readable("certs/ca.pem".into()));
    assert!(scene.may("certs/ca.pem", READ));
    for flags in [WRITE, MAKE, LIST] {
        assert!(!scene.may("certs/ca.pem", flags) || flags == LIST, "{flags:?}");
    }
    assert!(!scene.may("certs", READ) && !scene.may("disk", READ));
}

#[test]
fn an_image_is_granted_as_it_was_named_and_so_are_the_entries_of_its_directory() {
    let mut scene = Scene::new();
    scene.grants.hear(Word::Image("./disk".into()));
    let absolute = scene.at("disk").to_string_lossy().into_owned();
    for name in ["disk", "./disk", ".//disk", &absolute] {
        assert!(scene.may(name, READ) && scene.may(name, WRITE), "{name}");
    }
    assert!(scene.may(".", LIST));
    for name in ["base", "other/../disk", "other/secret", "disk/", "../disk"] {
        assert_eq!(scene.may(name, WRITE), name == "disk/", "{name}");
    }
    // Reading a directory's entries isn't opening what is there, nor writing it.
    assert!(!scene.may(".", WRITE) && !scene.may("other", LIST) && !scene.may("..", LIST));
}

#[test]
fn what_was_made_may_be_removed_and_what_was_there_not() {
    let mut scene = Scene::new();
    scene.grants.hear(Word::Image("disk".into()));
    scene.grants.hear(Word::Image("new".into()));
    assert!(scene.may("new", MAKE) && scene.may("disk", WRITE));
    let new = scene.at("new");
    scene.grants.made(new.clone());
    let (disk, base) = (scene.at("disk"), scene.at("base"));
    assert_eq!(scene.grants.remove(&new), Ok(new.clone()));
    assert_eq!(scene.grants.remove(&disk), Err(Errno::ACCESS));
    assert_eq!(scene.grants.remove(&base), Err(Errno::ACCESS));
    assert!(scene.grants.rename(&new, &disk).is_err());
    // A file with our number is ours, also if an earlier process left it.
    scene.grants.hear(Word::Own("base".into()));
    assert!(scene.may("base", WRITE) && scene.grants.remove(&base).is_ok());
    // It may be written under another name that is ours as well.
    let written = scene.at("base.new");
    assert!(scene.grants.rename(&written, &base).is_err());
    scene.grants.hear(Word::Own("base.new".into()));
    assert!(scene.grants.rename(&written, &base).is_ok());
    assert!(scene.grants.rename(&written, &disk).is_err() && scene.grants.rename(&disk, &base).is_err());
}

#[test]
fn a_socket_that_was_named_may_be_replaced() {
    let mut scene = Scene::new();
    let (path, other) = (scene.at("nbd.sock"), scene.at("other.sock"));
    let _listeners = [&path, &other].map(|path| UnixListener::bind(path).unwrap());
    scene.grants.hear(Word::File("nbd.sock".into()));
    assert!(scene.grants.remove(&path).is_ok() && scene.grants.remove(&other).is_err());
    for (name, granted) in [("nbd.sock", true), ("other.sock", false)] {
        assert_eq!(scene.grants.bind(&Address::Path(name.into())).is_ok(), granted);
        assert_eq!(scene.grants.connect(&Address::Path(scene.at(name))).is_ok(), granted);
    }
    // Names without a file, filled up or not.
    for (name, granted) in
        [(&b"nbd.sock"[..], true), (b"nbd.sock\0\0\0", true), (b"nbd.soc", false), (b"", false)]
    {
        assert_eq!(scene.grants.bind(&Address::Abstract(name.to_vec())).is_ok(), granted, "{name:?}");
    }
}

#[test]
fn headers_are_read_once_for_each_time_that_an_image_is_named() {
    let mut scene = Scene::new();
    let (disk, base) = (scene.at("disk"), scene.at("base"));
    scene.grants.hear(Word::Image("disk".into()));
    assert!(scene.grants.open(&disk, WRITE).unwrap().look);
    scene.grants.found(&disk, vec![Named { path: base.clone(), header: true }]);
    assert!(
        !scene.grants.open(&disk, WRITE).unwrap().look,
        "what the data plane wrote there counts for nothing"
    );
    let grant = scene.grants.open(&base, WRITE).unwrap();
    assert!(grant.look && !grant.links, "{grant:?}");
    assert!(!scene.may("base", MAKE), "what an image names isn't made");
    scene.grants.found(&base, Vec::new());
    assert!(!scene.grants.open(&base, READ).unwrap().look);
    scene.grants.hear(Word::Image("disk".into()));
    assert!(scene.grants.open(&disk, READ).unwrap().look);
}

#[test]
fn a_backing_file_that_was_announced_is_granted_beside_an_image() {
    let mut scene = Scene::new();
    scene.grants.hear(Word::Backing("base".into()));
    assert!(!scene.may("base", READ), "there is no image beside it");
    scene.grants.hear(Word::Image("disk".into()));
    let base = scene.at("base");
    assert!(scene.grants.open(&base, WRITE).is_ok_and(|grant| grant.regular && !grant.links));
    assert!(!scene.may("other/secret", READ));
}

#[test]
fn directories_of_certificates_are_read_and_not_written() {
    let mut scene = Scene::new();
    scene.grants.hear(Word::Directory("certs".into()));
    assert!(scene.may("certs/ca.pem", READ) && scene.may("certs", LIST));
    for (name, flags) in
        [("certs/ca.pem", WRITE), ("certs/new", MAKE), ("certs/sub/key", READ), ("certs/../disk", READ)]
    {
        assert!(!scene.may(name, flags), "{name}");
    }
}

#[test]
fn a_directory_for_state_is_the_data_planes_and_nothing_beside_it() {
    let mut scene = Scene::new();
    symlink("../other", scene.at("state/out")).unwrap();
    symlink("state", scene.at("link")).unwrap();
    scene.grants.hear(Word::State("link".into()));
    assert!(scene.may("state/job", WRITE) && scene.may("link/new", MAKE) && scene.may("state", LIST));
    for name in ["state/out/secret", "state/../disk", "disk", "state2/x", "state/nowhere/x"] {
        assert!(!scene.may(name, WRITE), "{name}");
    }
    let [from, to, out] = ["state/a", "state/b", "state/out/c"].map(|name| scene.at(name));
    assert!(scene.grants.rename(&from, &to).is_ok() && scene.grants.rename(&from, &out).is_err());
    assert!(scene.grants.remove(&from).is_ok() && scene.grants.remove(&out).is_err());
}

#[test]
fn what_images_may_name_is_opened_and_not_made() {
    let mut scene = Scene::new();
    scene.grants.hear(Word::Allowed("other".into()));
    scene.grants.hear(Word::Allowed("base".into()));
    let [secret, base, directory, disk] =
        ["other/secret", "base", "other", "disk"].map(|name| scene.at(name));
    assert!(scene.grants.open(&secret, WRITE).is_ok_and(|grant| grant.regular && grant.look));
    assert!(scene.grants.open(&base, READ).is_ok_and(|grant| !grant.regular), "a device may be named itself");
    assert!(scene.grants.open(&directory.join("new"), MAKE).is_err());
    assert!(scene.grants.open(&disk, READ).is_err());
}

#[test]
fn of_the_system_only_what_names_of_hosts_take_is_read() {
    for (path, granted) in [
        ("/etc/hosts", true),
        ("/etc/ssl/certs/ca-certificates.crt", true),
        ("/usr/lib/x86_64-linux-gnu/libnss_dns.so.2", true),
        ("/sys/dev/block/7:0/ro", true),
        ("/etc/shadow", false),
        ("/etc/ssl/private/key.pem", false),
        ("/etc/ssl/certs/../private/key.pem", false),
        ("/usr/lib/systemd/system/ssh.service", false),
        ("/sys/dev/block/7:0/../ro", false),
        ("/sys/dev/block/a:b/ro", false),
        ("/etc/hostsx", false),
    ] {
        assert_eq!(is_of_system(Path::new(path)), granted, "{path}");
        let open = |flags| Scene::new().grants.open(Path::new(path), flags).is_ok();
        assert_eq!(open(READ), granted, "{path}");
        assert!(!open(WRITE) && !open(MAKE), "{path}");
    }
}

#[test]
fn nothing_may_be_written_to_and_not_made_nor_removed() {
    let mut scene = Scene::new();
    assert!(scene.may("/dev/null", WRITE) && !scene.may("/dev/null", MAKE));
    assert!(scene.grants.remove(Path::new("/dev/null")).is_err());
}

#[test]
fn the_data_plane_never_reaches_a_monitor() {
    let mut grants = Grants::new("/".into());
    grants.keep_from(4444);
    for (address, granted) in [
        ("127.0.0.1:4444", false),
        ("127.1.2.3:4444", false),
        ("0.0.0.0:4444", false),
        ("[::1]:4444", false),
        ("[::ffff:127.0.0.1]:4444", false),
        ("127.0.0.1:4445", true),
        // Kept for documentation: no machine has it.
        ("192.0.2.1:4444", true),
    ] {
        assert_eq!(grants.connect(&Address::Inet(address.parse().unwrap())).is_ok(), granted, "{address}");
    }
}

#[test]
fn a_disk_is_mounted_over_the_file_that_was_named_and_no_other() {
    let mut scene = Scene::new();
    assert!(!scene.may("/dev/fuse", WRITE));
    scene.grants.hear(Word::MountPoint("./disk".into()));
    assert!(scene.may("/dev/fuse", WRITE) && !scene.may("/dev/fuse", MAKE));
    assert!(scene.grants.mount(&scene.at("disk")).is_ok());
    for name in ["base", "other", "other/secret", ""] {
        assert!(scene.grants.mount(&scene.at(name)).is_err(), "{name}");
    }
    // What lies below isn't read because of that.
    assert!(!scene.may("disk", READ));
}

#[test]
fn what_a_guest_may_have_written_is_no_header() {
    let mut scene = Scene::new();
    let (disk, base) = (scene.at("disk"), scene.at("base"));
    scene.grants.hear(Word::Raw("disk".into()));
    assert!(scene.grants.open(&disk, WRITE).is_ok_and(|grant| !grant.look));
    // The operator says otherwise, and says again that it is raw: a header that was not read yet will be.
    scene.grants.hear(Word::Image("disk".into()));
    scene.grants.hear(Word::Raw("disk".into()));
    assert!(scene.grants.open(&disk, WRITE).unwrap().look);
    scene.grants.found(&disk, vec![Named { path: base.clone(), header: false }]);
    assert!(scene.grants.open(&base, READ).is_ok_and(|grant| !grant.look));
}
