//! `headwater boot` around the machine: a script stands for QEMU. (tests/guest boots real ones.)

use crate::common::*;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

/// A source of 8 MiB, and a machine that does what a script says.
struct Boot {
    scratch: Scratch,
    raw: String,
    disk: String,
    machine: String,
}

impl Boot {
    fn new(seed: u64, script: &str) -> Self {
        let scratch = Scratch::new();
        let (raw, disk, machine) =
            (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("machine"));
        make_raw(&raw, 8 * MIB, seed);
        std::fs::write(&machine, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&machine, Permissions::from_mode(0o755)).unwrap();
        Self { scratch, raw, disk, machine }
    }

    /// Slow enough for the machine to end first.
    fn start(&self) -> Running {
        Running::start(&[
            "boot",
            &self.raw,
            &self.disk,
            "--rate",
            "256K",
            "--qemu",
            &self.machine,
            "--",
            "-name",
            "a b",
        ])
    }

    /// What was copied is kept, the words say how to go on, and going on works.
    fn assert_resumable(&self, ended: &Ended) {
        let again = format!("goes on with: headwater boot {} {} ", self.raw, self.disk);
        assert!(
            ended.stderr.replace(env!("CARGO_BIN_EXE_headwater"), "headwater").contains(&again),
            "{}",
            ended.stderr
        );
        assert!(ended.stderr.contains("-name 'a b'"), "{}", ended.stderr);
        assert_sound(&self.disk);
        headwater(&["stream", &self.raw, &self.disk]).code(0);
        assert_streamed(&self.disk, &self.raw, "raw");
    }
}

#[test]
fn a_machine_that_is_switched_off_early_leaves_a_disk_that_goes_on() {
    let boot = Boot::new(1, "printf '%s\\n' \"$@\" > \"$0.words\"; sleep 0.5");
    let ended = boot.start().wait().code(0);
    let words = std::fs::read_to_string(boot.scratch.path("machine.words")).unwrap();
    assert!(words.ends_with("\n-name\na b\n"), "{words}");
    boot.assert_resumable(&ended);
}

#[test]
fn a_machine_that_fails_is_told_apart() {
    let boot = Boot::new(2, "echo 'no such option' >&2; exit 1");
    let ended = boot.start().wait().code(1);
    assert!(ended.stderr.contains("no such option"), "{}", ended.stderr);
    ended.says(&["the machine failed", "exit status: 1"]);
}

#[test]
fn an_interruption_ends_the_machine_and_is_no_failure_of_it() {
    let boot = Boot::new(3, "echo here > \"$0.runs\"; exec sleep 60");
    let mut running = boot.start();
    running.wait_until("a machine", |_| std::fs::exists(boot.scratch.path("machine.runs")).unwrap());
    running.signal("TERM");
    let ended = running.wait().code(130);
    assert!(!ended.stderr.contains("failed"), "{}", ended.stderr);
    boot.assert_resumable(&ended);
}

#[test]
fn a_machine_that_does_not_end_when_asked_is_ended_when_asked_twice() {
    let boot = Boot::new(4, "trap '' TERM; echo here > \"$0.runs\"; while true; do sleep 0.1; done");
    let mut running = boot.start();
    running.wait_until("a machine", |_| std::fs::exists(boot.scratch.path("machine.runs")).unwrap());
    running.signal("INT");
    running.wait_until("word of it", |running| running.err().contains("interrupt again"));
    running.signal("INT");
    running.wait().code(130);
    assert_sound(&boot.disk);
}

#[test]
fn without_a_machine_no_disk_is_made() {
    let boot = Boot::new(5, "");
    let missing = boot.scratch.path("no-machine");
    let ended = headwater(&["boot", &boot.raw, &boot.disk, "--qemu", &missing]).code(1);
    ended.says(&[&missing, "--qemu"]);
    assert!(!std::fs::exists(&boot.disk).unwrap());
    std::fs::set_permissions(&boot.machine, Permissions::from_mode(0o644)).unwrap();
    let ended = headwater(&["boot", &boot.raw, &boot.disk, "--qemu", &boot.machine]).code(1);
    ended.says(&[&boot.machine, "--qemu"]);
    assert!(!std::fs::exists(&boot.disk).unwrap());
}
