//! A library of malformed images, and what every command makes of each: an error in one line that names the image and what is wrong, soon and
//! in little memory; and nothing is opened that nobody but the image asked for.
//!
//! Each image is looked at, mapped, checked, repaired (a copy of it) and served to a client that reads all of it. What is opened meanwhile is
//! watched: in the image's directory only the image and what it may name, in a directory beside that nothing, nor is anybody
//! connected to.

mod case;
mod headers;
mod image;
mod names;
mod tables;
mod watch;

use crate::common::*;
use case::{Case, Expected};
use image::{CLUSTER, GUEST_CLUSTERS};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use watch::{Listeners, Watch};

/// What a command may cost with a malformed image.
const MOST_CPU: Duration = Duration::from_secs(1);
const MOST_MEMORY: u64 = 64 << 20;

/// The name of a file that nobody may open, in a directory that isn't the image's.
const SECRET: &str = "secret.raw";

/// Where the images of a test are, and around them what they must not lead to.
struct Place {
    scratch: Scratch,
    /// The directory of the images.
    images: String,
    /// Another one beside it.
    forbidden: String,
    /// A socket that somebody listens at.
    socket: String,
    listeners: Listeners,
}

impl Place {
    fn new() -> Self {
        let scratch = Scratch::new();
        let (images, forbidden) = (scratch.path("images"), scratch.path("forbidden"));
        for dir in [&images, &forbidden, &scratch.path("copies"), &format!("{images}/below")] {
            std::fs::create_dir(dir).unwrap();
        }
        std::fs::write(format!("{forbidden}/{SECRET}"), [0x5e; 4096]).unwrap();
        let inside = |name: &str| format!("{images}/{name}");
        std::fs::write(inside("beside.raw"), vec![3; (GUEST_CLUSTERS * CLUSTER) as usize]).unwrap();
        std::os::unix::fs::symlink(format!("../forbidden/{SECRET}"), inside("link.raw")).unwrap();
        std::os::unix::fs::symlink("../forbidden", inside("linked")).unwrap();
        std::os::unix::fs::symlink("circle", inside("circle")).unwrap();
        std::os::unix::fs::symlink("bad.qcow2", inside("itself.qcow2")).unwrap();
        tool("mkfifo", &[inside("fifo")]);
        let socket = inside("socket");
        let listeners = Listeners::new(&socket);
        Self { scratch, images, forbidden, socket, listeners }
    }

    /// Runs all commands on the image of a case.
    fn try_case(&self, case: &Case) {
        let image = format!("{}/bad.qcow2", self.images);
        case.image.write(&image);
        for (name, beside) in &case.beside {
            beside.write(&format!("{}/{name}", self.images));
        }
        // Devices are not watched: other tests open them, too.
        let watch = Watch::new(&[&self.images, &self.forbidden]);
        let run = Run { case, image: &image, serving: self.scratch.path("disk.sock") };
        run.all();
        let mut allowed = BTreeSet::from([image.clone()]);
        allowed.extend(case.beside.iter().map(|(name, _)| format!("{}/{name}", self.images)));
        let opened = watch.opened();
        assert!(opened.is_subset(&allowed), "{}: it opened {:?}", case.name, opened.difference(&allowed));
        assert!(!self.listeners.met(), "{}: it connected to somebody", case.name);
        let copy = format!("{}/bad.qcow2", self.scratch.path("copies"));
        case.image.write(&copy);
        run.repair(&copy);
        for (name, _) in &case.beside {
            std::fs::remove_file(format!("{}/{name}", self.images)).unwrap();
        }
    }
}

/// The commands on one image.
struct Run<'a> {
    case: &'a Case,
    image: &'a str,
    /// The socket at which it is served.
    serving: String,
}

impl Run<'_> {
    fn all(&self) {
        use Expected::*;
        let expected = self.case.expected;
        let info = self.run(&["info", self.image]);
        self.run(&["info", "--json", "--backing-chain", self.image]);
        let map = self.run(&["map", "--json", self.image]);
        let check = self.run(&["check", self.image]);
        let read = self.serve();
        let says = &self.case.says;
        match expected {
            Refused | NotOpened | ChainRefused => {
                self.refuses("map", &map);
                self.refuses("serve", &read.ended);
                if expected == Refused {
                    self.refuses("check", &check);
                } else {
                    assert_eq!(check.code, Some(0), "{self}: check said {}{}", check.stdout, check.stderr);
                }
                match expected {
                    ChainRefused => assert_eq!(info.code, Some(0), "{self}: info said {}", info.stderr),
                    _ => self.refuses("info", &info),
                }
            }
            Damaged => {
                assert_eq!(check.code, Some(2), "{self}: check said {}{}", check.stdout, check.stderr);
                assert!(
                    check.stdout.contains(says),
                    "{self}: no {says:?} in what check says:\n{}",
                    check.stdout
                );
            }
            Unreadable(bad) => {
                assert_eq!(check.code, Some(0), "{self}: check said {}{}", check.stdout, check.stderr);
                assert_eq!((read.failed, read.pieces), (bad, GUEST_CLUSTERS), "{self}: reading");
            }
            Harmless => {
                assert_eq!(map.code, Some(0), "{self}: map said {}", map.stderr);
                assert_eq!(read.failed, 0, "{self}: reading");
            }
        }
    }

    /// Asserts that a command refused the image for the right reason.
    fn refuses(&self, command: &str, ended: &Ended) {
        let says = &self.case.says;
        // Of its own kinds of failure, a check tells "can't be checked" from "couldn't be".
        let fits = ended.code == Some(1) || command == "check" && ended.code == Some(63);
        assert!(fits, "{self}: {command} ended with {:?}: {}{}", ended.code, ended.stdout, ended.stderr);
        assert!(ended.stderr.contains(says), "{self}: {command} doesn't say {says:?}: {}", ended.stderr);
    }

    /// Runs a command to its end, which must be a decent one.
    fn run(&self, args: &[&str]) -> Ended {
        // Shown if it fails.
        println!("{self}: {args:?}");
        let format: Vec<&str> = self.case.format.map_or(vec![], |format| vec!["--format", format]);
        let started = now();
        let ended = headwater(&[args, &format].concat());
        assert!(elapsed(started) < Duration::from_secs(20), "{self}: {args:?} took {:?}", elapsed(started));
        self.is_decent(args[0], &ended);
        ended
    }

    fn is_decent(&self, command: &str, ended: &Ended) {
        let Ended { code, stderr, cpu, peak, .. } = ended;
        assert!(!stderr.contains("panicked"), "{self}: {command}: {stderr}");
        assert!(matches!(code, Some(0..=3 | 63)), "{self}: {command} ended with {code:?}: {stderr}");
        let complains = *code == Some(1) || !stderr.is_empty();
        if complains {
            // A client's reads that fail are told of in a line for each, and so is where it is served.
            let most = if command == "serve" { 40 } else { 1 };
            assert!(stderr.lines().count() <= most, "{self}: {command}: more than one line:\n{stderr}");
            let named = |line: &str| {
                line.contains("bad.qcow2") || self.case.beside.iter().any(|(name, _)| line.contains(name))
            };
            assert!(stderr.lines().all(named), "{self}: {command} doesn't name the image:\n{stderr}");
            assert!(!stderr.chars().any(|c| c.is_control() && c != '\n'), "{self}: {command}: {stderr:?}");
        }
        assert!(*cpu < MOST_CPU, "{self}: {command} took {cpu:?} of CPU time");
        assert!(*peak < MOST_MEMORY, "{self}: {command} took {} KiB of memory", peak >> 10);
    }

    /// Serves the image, and reads all of its first 4 MiB.
    fn serve(&self) -> Read {
        let uri = format!("nbd+unix:///disk?socket={}", self.serving);
        let mut args = vec!["serve", self.image, "--read-only", "--serve", &uri];
        args.extend(self.case.format.iter().flat_map(|format| ["--format", format]));
        let _ = std::fs::remove_file(&self.serving);
        let running = Running::start(&args);
        let mut read = (0, 0);
        let started = now();
        while running.is_alive() {
            if Path::new(&self.serving).exists() {
                let said = nbdsh(&uri, CLIENT);
                let mut numbers = said.split_whitespace().map(|word| word.parse().expect("a number"));
                read = (numbers.next().expect("failures"), numbers.next().expect("pieces"));
                running.signal("TERM");
                break;
            }
            assert!(elapsed(started) < Duration::from_secs(20), "{self}: it isn't served");
            std::thread::sleep(Duration::from_millis(2));
        }
        let ended = running.wait();
        self.is_decent("serve", &ended);
        Read { failed: read.0, pieces: read.1, ended }
    }

    /// Repairs a copy of the image. Whatever that says, a check afterwards says the same.
    fn repair(&self, copy: &str) {
        let repaired = self.run(&["check", "--repair", "all", copy]);
        let again = self.run(&["check", copy]);
        assert_eq!(repaired.code, again.code, "{self}: repaired: {}again: {}", repaired.stdout, again.stdout);
    }
}

impl std::fmt::Display for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.case.name)
    }
}

/// What a client got.
struct Read {
    failed: u64,
    pieces: u64,
    ended: Ended,
}

/// Reads in pieces of 64 KiB, and asks what they are; prints how many reads failed of how many.
const CLIENT: &str = "
size = min(h.get_size(), 4 << 20)
failed = pieces = 0
for at in range(0, size, 65536):
    pieces += 1
    try:
        h.pread(min(65536, size - at), at)
    except nbd.Error:
        failed += 1
try:
    h.block_status(max(size, 1), 0, lambda *answer: None)
except nbd.Error:
    pass
h.shutdown()
print(failed, pieces)
";

fn try_all(cases: impl FnOnce(&Place) -> Vec<Case>) {
    let place = Place::new();
    let cases = cases(&place);
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two cases have the same name");
    for case in &cases {
        place.try_case(case);
    }
}

#[test]
fn backing_files_that_images_may_not_choose() {
    try_all(names::backings);
}

#[test]
fn data_files_that_images_may_not_choose() {
    try_all(names::data_files);
}

#[test]
fn chains_that_run_in_circles() {
    try_all(names::circles);
}

#[test]
fn headers_that_lie() {
    try_all(|_| headers::headers());
}

#[test]
fn files_that_are_cut_short_or_something_else() {
    try_all(|_| [headers::cut_short(), headers::formats()].into_iter().flatten().collect());
}

#[test]
fn tables_that_lead_astray() {
    try_all(|_| tables::entries());
}

#[test]
fn counts_snapshots_and_bitmaps_that_lie() {
    try_all(|_| [tables::counts(), tables::snapshots(), headers::bitmaps()].into_iter().flatten().collect());
}

#[test]
fn compressed_clusters_that_are_bombs_or_none() {
    try_all(|_| tables::bombs());
}

#[test]
fn a_check_of_a_sparse_file_takes_little_memory() {
    // Not repaired, which would write a gigabyte of counts.
    let place = Place::new();
    let (case, image) = (tables::far_apart(), format!("{}/bad.qcow2", place.images));
    case.image.write(&image);
    let run = Run { case: &case, image: &image, serving: String::new() };
    let check = run.run(&["check", &image]);
    assert_eq!(check.code, Some(2), "{}{}", check.stdout, check.stderr);
    assert!(check.stdout.contains(&case.says), "{}", check.stdout);
}
