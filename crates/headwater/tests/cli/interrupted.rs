//! Streams that end early, and the same command again.

use crate::common::*;

/// A stream of 24 MiB that is slow enough to be caught at work.
struct Slow {
    scratch: Scratch,
    raw: String,
    disk: String,
}

impl Slow {
    fn new(seed: u64) -> Self {
        let scratch = Scratch::new();
        let (raw, disk) = (scratch.path("source.raw"), scratch.path("disk.qcow2"));
        make_raw(&raw, 24 * MIB, seed);
        Self { scratch, raw, disk }
    }

    fn start(&self, rate: &str) -> Running {
        Running::start(&[
            "stream",
            &self.raw,
            &self.disk,
            "--serve",
            &self.scratch.uri("disk"),
            "--rate",
            rate,
            "--json",
        ])
    }

    /// Lets it run until a part has been copied.
    fn start_and_wait(&self) -> Running {
        let mut running = self.start("8M");
        running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(2 * MIB));
        running
    }

    /// Runs the same command to its end; it must have less to do than the first.
    fn resume(&self) {
        let ended = headwater(&["stream", &self.raw, &self.disk, "--json"]).code(0);
        let last = ended.last_json();
        assert_eq!(last["result"], "completed");
        // Four of five runs are stored by the source: 19 MiB.
        assert!(last["total"].as_u64() < Some(18 * MIB), "nothing was kept: {last}");
        assert_streamed(&self.disk, &self.raw, "raw");
    }
}

#[test]
fn control_c_leaves_a_consistent_overlay_and_says_how_to_resume() {
    for signal in ["INT", "TERM"] {
        let slow = Slow::new(1);
        let running = slow.start_and_wait();
        running.signal(signal);
        let ended = running.wait().code(130);
        let last = ended.last_json();
        assert_eq!(last["result"], "interrupted", "{last}");
        let resume = format!("headwater stream {} {}", slow.raw, slow.disk);
        assert!(ended.stderr.contains(&resume), "{}", ended.stderr);
        assert_sound(&slow.disk);
        tool("qemu-img", &["compare", &slow.disk, &slow.raw]);
        slow.resume();
    }
}

#[test]
fn killed_at_work_it_resumes() {
    let slow = Slow::new(2);
    for _ in 0..3 {
        let mut running = slow.start("16M");
        running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(3 * MIB));
        running.kill();
        // The next run must cope with leaks.
        assert_no_errors(&slow.disk);
        tool("qemu-img", &["compare", &slow.disk, &slow.raw]);
    }
    let ended = headwater(&["stream", &slow.raw, &slow.disk]).code(0);
    assert!(ended.stderr.contains("goes on") || ended.stderr.contains("resum"), "{}", ended.stderr);
    tool("qemu-img", &["compare", &slow.disk, &slow.raw]);
    assert_no_errors(&slow.disk);
}

#[test]
fn what_a_client_flushed_survives_a_kill() {
    let slow = Slow::new(3);
    let mut running = slow.start("2M");
    running.wait_for_socket(&slow.scratch.path("disk.sock"));
    nbdsh(
        &slow.scratch.uri("disk"),
        "h.pwrite(b'kept' * 1000, 20000000)\nh.trim(1<<20, 8<<20)\nh.flush()\nh.pwrite(b'x' * 512, 0, nbd.CMD_FLAG_FUA)",
    );
    running.kill();
    headwater(&["stream", &slow.raw, &slow.disk]).code(0);
    let back = slow.scratch.path("back.raw");
    tool("qemu-img", &["convert", "-O", "raw", &slow.disk, &back]);
    let (back, mut expected) = (read_file(&back), read_file(&slow.raw));
    expected[20_000_000..20_004_000].copy_from_slice(&b"kept".repeat(1000));
    expected[8 << 20..9 << 20].fill(0);
    expected[..512].fill(b'x');
    assert!(back == expected);
}

/// A machine that goes on with the next run believes what it was told: it won't write again what it hasn't flushed yet.
#[test]
fn what_was_answered_survives_a_kill() {
    let slow = Slow::new(5);
    let mut running = slow.start("2M");
    running.wait_for_socket(&slow.scratch.path("disk.sock"));
    nbdsh(
        &slow.scratch.uri("disk"),
        "h.pwrite(b'kept' * 1000, 20000000)\nh.zero(1<<20, 8<<20)\nh.pwrite(b'x' * 512, 20002048)",
    );
    running.kill();
    headwater(&["stream", &slow.raw, &slow.disk]).code(0);
    let back = slow.scratch.path("back.raw");
    tool("qemu-img", &["convert", "-O", "raw", &slow.disk, &back]);
    let (back, mut expected) = (read_file(&back), read_file(&slow.raw));
    expected[20_000_000..20_004_000].copy_from_slice(&b"kept".repeat(1000));
    expected[20_002_048..20_002_560].fill(b'x');
    expected[8 << 20..9 << 20].fill(0);
    assert!(back == expected);
}

#[test]
fn a_complete_disk_is_left_alone_and_served_again() {
    let slow = Slow::new(4);
    headwater(&["stream", &slow.raw, &slow.disk]).code(0);
    let before = read_file(&slow.disk);
    let again = headwater(&["stream", &slow.raw, &slow.disk, "--json"]).code(0);
    assert!(again.stderr.contains("complete"), "{}", again.stderr);
    assert_eq!(again.last_json()["result"], "completed");
    assert!(read_file(&slow.disk) == before);
    // The source may even be gone by now.
    std::fs::remove_file(&slow.raw).unwrap();
    headwater(&["stream", &slow.raw, &slow.disk]).code(0);
    let mut running = slow.start("0");
    running.wait_for_socket(&slow.scratch.path("disk.sock"));
    assert_eq!(tool("nbdinfo", &["--size", &slow.scratch.uri("disk")]).trim(), (24 * MIB).to_string());
    assert!(running.is_alive());
    running.signal("INT");
    running.wait().code(0);
    let served = headwater(&[
        "stream",
        &slow.raw,
        &slow.disk,
        "--serve",
        &slow.scratch.uri("disk"),
        "--exit-when-done",
    ]);
    served.code(0);
}

#[test]
fn a_disk_without_space_keeps_what_it_has_and_goes_on_later() {
    let scratch = Scratch::new();
    let (raw, small) = (scratch.path("source.raw"), scratch.path("small"));
    make_raw(&raw, 16 * MIB, 5);
    std::fs::create_dir(&small).unwrap();
    let mount = tool_output("mount", &["-t", "tmpfs", "-o", "size=4M", "none", &small]);
    if !mount.status.success() {
        eprintln!("not tried: only root can mount a small filesystem");
        return;
    }
    let _unmount = Unmount(small.clone());
    let disk = format!("{small}/disk.qcow2");
    let ended = headwater(&["stream", &raw, &disk]).code(1);
    assert!(ended.stderr.contains("space"), "{}", ended.stderr);
    let ended = ended.says(&["disk.qcow2"]);
    assert!(ended.stderr.contains("headwater stream"), "it doesn't say how to go on: {}", ended.stderr);
    assert_no_errors(&disk);
    tool("qemu-img", &["compare", &disk, &raw]);
    // With the policy for it, the job waits for space instead, and the guest reads on.
    let mut running = Running::start(&[
        "stream",
        &raw,
        &disk,
        "--on-error",
        "enospc",
        "--low-water",
        "0",
        "--serve",
        &scratch.uri("disk"),
        "--json",
        "--exit-when-done",
        "--control",
        &scratch.path("control.sock"),
    ]);
    running.wait_for_status("a pause", |status| status["state"] == "paused");
    nbdsh(
        &scratch.uri("disk"),
        &format!("assert h.pread(512, 15<<20) == open('{raw}', 'rb').read()[15<<20:(15<<20)+512]"),
    );
    tool("mount", &["-o", "remount,size=64M", &small]);
    headwater(&["ctl", &scratch.path("control.sock"), "resume"]).code(0);
    running.wait().code(0);
    assert_no_errors(&disk);
    tool("qemu-img", &["compare", &disk, &raw]);
}

struct Unmount(String);

impl Drop for Unmount {
    fn drop(&mut self) {
        tool_output("umount", &["-l", &self.0]);
    }
}

#[test]
fn a_source_that_hangs_does_not_hold_up_the_end() {
    let scratch = Scratch::new();
    let (raw, disk, socket) =
        (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("kit.sock"));
    make_raw(&raw, 8 * MIB, 6);
    let kit = Background::nbdkit(&socket, &["file", &raw]);
    let (source, uri) = (format!("nbd+unix:///?socket={socket}"), scratch.uri("disk"));
    let mut running = Running::start(&["stream", &source, &disk, "--serve", &uri, "--rate", "1M", "--json"]);
    running.wait_for_status("progress", |status| status["copied"].as_u64() > Some(100_000));
    kit.signal("STOP");
    // A client waits for what only the source has: that is given up as well.
    let script = format!("import nbd\nh = nbd.NBD()\nh.connect_uri('{uri}')\nh.pread(512, 6_700_000)");
    let _client = Background::start("/usr/bin/python3", &["-c", &script]);
    running.wait_for_status("a client", |status| status["guest_reads"].as_u64() > Some(0));
    let start = now();
    running.signal("INT");
    let ended = running.wait().code(130);
    assert!(ended.stderr.contains("disk.qcow2 is consistent"), "{}", ended.stderr);
    assert!(elapsed(start).as_secs() < 10);
    assert_no_errors(&disk);
    // Another server: nbdkit 1.32 may die of a client that left in the middle of a reply.
    drop(kit);
    let _kit = Background::nbdkit(&socket, &["file", &raw]);
    headwater(&["stream", &source, &disk]).code(0);
    tool("qemu-img", &["compare", &disk, &raw]);
}

#[test]
fn memory_stays_within_bounds() {
    let scratch = Scratch::new();
    let (raw, disk, socket) =
        (scratch.path("source.raw"), scratch.path("disk.qcow2"), scratch.path("kit.sock"));
    make_raw(&raw, 96 * MIB, 7);
    let _kit = Background::nbdkit(&socket, &["--filter=delay", "file", &raw, "delay-read=20ms"]);
    let (source, uri) = (format!("nbd+unix:///?socket={socket}"), scratch.uri("disk"));
    let mut running = Running::start(&["stream", &source, &disk, "--serve", &uri, "--json"]);
    running.wait_for_status("completion", |status| status["state"] == "completed");
    tool("qemu-img", &["compare", &uri, &raw]);
    let status = String::from_utf8(read_file(&format!("/proc/{}/status", running.pid()))).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 128 << 10, "{peak} KiB");
}
