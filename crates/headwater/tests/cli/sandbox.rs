//! The daemon in its sandbox: that it is in force, that it shows nowhere, and how its two processes end. What somebody who has taken over
//! the data plane can't do is tried in headwater-sandbox, from inside.

use crate::common::monitor::Monitor;
use crate::common::*;
use crate::daemon::Daemon;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::json;
use std::fs;
use std::net::TcpListener;

/// False on a machine that has no sandbox, which the daemon does without by itself.
fn is_there() -> bool {
    let ended = headwater(&["daemon", "--sandbox", "on", "--blockdev", "driver=nothing"]);
    let there = !ended.stderr.contains("--sandbox on:");
    if !there {
        println!("skipped: {}", ended.stderr);
    }
    there
}

/// A field of `/proc/PID/status` or that of a thread.
fn field(status: &str, name: &str) -> String {
    let text = fs::read_to_string(status).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// The process that has `pid` as its parent.
fn child_of(pid: u32) -> Option<u32> {
    let numbers =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    numbers
        .filter_map(|name| name.parse().ok())
        .find(|number| field(&format!("/proc/{number}/status"), "PPid") == pid.to_string())
}

fn is_gone(pid: u32) -> bool {
    // One that nobody has waited for is gone, too.
    ["", "Z (zombie)", "X (dead)"].contains(&&*field(&format!("/proc/{pid}/status"), "State"))
}

#[track_caller]
fn wait_until_gone(pid: u32) {
    let start = now();
    while !is_gone(pid) {
        assert!(elapsed(start) < PATIENCE, "{pid} is still there");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn every_thread_is_locked_down_and_without_a_sandbox_none() {
    if !is_there() {
        return;
    }
    let daemon = Daemon::start(1, &[]);
    // Reads, so that there are threads for files.
    daemon.jobs(&["stream", "disk", "--id", "fill"]).code(0);
    daemon.jobs(&["watch"]).code(0);
    let pid = daemon.running.pid();
    let tasks: Vec<_> =
        fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path()).collect();
    assert!(tasks.len() > 1, "{tasks:?}");
    for task in &tasks {
        let status = task.join("status");
        let status = status.to_str().unwrap();
        assert_eq!((&*field(status, "Seccomp"), &*field(status, "NoNewPrivs")), ("2", "1"), "{status}");
    }
    let broker = child_of(pid).expect("a broker");
    assert_eq!(field(&format!("/proc/{broker}/status"), "Seccomp"), "2");

    let plain = Daemon::start(1, &["--sandbox", "off"]);
    let status = format!("/proc/{}/status", plain.running.pid());
    assert_eq!(field(&status, "Seccomp"), field("/proc/self/status", "Seccomp"));
    assert_eq!(child_of(plain.running.pid()), None);
}

#[test]
fn the_two_processes_end_together() {
    if !is_there() {
        return;
    }
    let mut daemon = Daemon::start(2, &["--sandbox", "on"]);
    let broker = child_of(daemon.running.pid()).expect("a broker");
    daemon.running.kill();
    wait_until_gone(broker);

    daemon = Daemon::start(2, &["--sandbox", "on"]);
    let broker = child_of(daemon.running.pid()).expect("a broker");
    // What ends a program from the terminal reaches both; the broker leaves it to the other.
    for signal in ["INT", "TERM", "HUP"] {
        tool("kill", &["-s", signal, &broker.to_string()]);
    }
    let mut monitor = Monitor::connect(&daemon.scratch.path("qmp"));
    monitor.run("query-block-jobs", &json!({}));
    tool("kill", &["-s", "KILL", &broker.to_string()]);
    daemon.running.wait().code(1).says(&["opens files", "ended"]);
    assert_sound(&daemon.disk);

    let daemon = Daemon::start(2, &["--sandbox", "on"]);
    let broker = child_of(daemon.running.pid()).expect("a broker");
    daemon.running.signal("TERM");
    daemon.running.wait().code(0);
    assert!(is_gone(broker), "it is waited for");
    assert!(!std::path::Path::new(&daemon.scratch.path("qmp")).exists(), "the monitor's socket is left");
}

#[test]
fn whatever_the_operator_names_is_opened_when_it_is_named() {
    let daemon = Daemon::start(3, &[]);
    let path = |name: &str| daemon.scratch.path(name);
    for directory in ["far", "far/below"] {
        fs::create_dir(path(directory)).unwrap();
    }
    // Chains whose lower layers only headers name: beside the image, below its directory, and made just now.
    make_raw(&path("far/below/base.raw"), MIB, 4);
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", "below/base.raw", "-F", "raw", &path("far/mid.qcow2")],
    );
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", &path("far/top.qcow2")],
    );
    let mut monitor = Monitor::connect(&path("qmp"));
    let qcow2 = |name: &str, file: &str| json!({"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": path(file)}});
    monitor.run("blockdev-add", &qcow2("top", "far/top.qcow2"));
    let nodes = monitor.run("query-named-block-nodes", &json!({"flat": true}));
    assert!(nodes.to_string().contains("far/below/base.raw"), "{nodes}");
    let unix = json!({"type": "unix", "data": {"path": path("nbd")}});
    monitor.run("nbd-server-start", &json!({"addr": unix}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": true});
    monitor.run("block-export-add", &export);
    let overlay =
        json!({"node-name": "top", "snapshot-file": path("far/new.qcow2"), "snapshot-node-name": "new"});
    monitor.run("blockdev-snapshot-sync", &overlay);
    assert!(fs::metadata(path("far/new.qcow2")).is_ok());

    let create = json!({"driver": "file", "filename": path("far/made.qcow2"), "size": 0});
    monitor.run("blockdev-create", &json!({"job-id": "file", "options": create}));
    monitor.wait_for_job("file");
    monitor.run(
        "blockdev-add",
        &json!({"driver": "file", "node-name": "made-file", "filename": path("far/made.qcow2")}),
    );
    let format = json!({"driver": "qcow2", "file": "made-file", "size": MIB, "backing-file": "below/base.raw", "backing-fmt": "raw"});
    monitor.run("blockdev-create", &json!({"job-id": "format", "options": format}));
    monitor.wait_for_job("format");
    monitor.run("blockdev-add", &json!({"driver": "qcow2", "node-name": "made", "file": "made-file"}));
    let nodes = monitor.run("query-named-block-nodes", &json!({"flat": true}));
    assert!(nodes.to_string().matches("far/below/base.raw\"").count() > 1, "{nodes}");

    let client = json!({"driver": "nbd", "node-name": "client", "export": "disk", "server": {"type": "unix", "path": path("nbd")}});
    monitor.run("blockdev-add", &client);
    monitor.run("blockdev-del", &json!({"node-name": "client"}));
    monitor.run("nbd-server-stop", &json!({}));
    assert!(!std::path::Path::new(&path("nbd")).exists());
}

#[test]
fn names_of_hosts_are_looked_up() {
    let daemon = Daemon::start(5, &[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let server = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let mut monitor = Monitor::connect(&daemon.scratch.path("qmp"));
    let server_address = json!({"type": "inet", "host": "localhost", "port": port});
    let refused = monitor
        .ask("blockdev-add", &json!({"driver": "nbd", "node-name": "far", "server": server_address}))
        .unwrap();
    assert!(refused.get("error").is_some(), "{refused}");
    // It was reached.
    server.join().unwrap();
}

#[test]
fn in_the_background_both_processes_leave_the_terminal() {
    if !is_there() {
        return;
    }
    let scratch = Scratch::new();
    let (pidfile, qmp) = (scratch.path("pid"), scratch.path("qmp"));
    let chardev = format!("socket,id=qmp,path={qmp},server=on,wait=off");
    let args = ["daemon", "--daemonize", "--pidfile", &pidfile, "--chardev", &chardev, "--monitor", "qmp"];
    headwater(&args).code(0);
    let pid: u32 = fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    let broker = child_of(pid).expect("a broker");
    let start = now();
    let leads_nowhere =
        |fd| fs::read_link(format!("/proc/{broker}/fd/{fd}")).is_ok_and(|to| to.ends_with("null"));
    while !(0..3).all(leads_nowhere) {
        assert!(elapsed(start) < PATIENCE, "the broker keeps the terminal");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Monitor::connect(&qmp).run("quit", &json!({}));
    wait_until_gone(pid);
    wait_until_gone(broker);
    assert!(!std::path::Path::new(&pidfile).exists());
}

/// A system that lacks something, or forbids it: the daemon does without, unless it must not.
#[test]
fn without_what_it_takes_there_is_none_and_it_is_said() {
    if !is_there() {
        return;
    }
    for (call, error, what) in [
        (libc::SYS_landlock_create_ruleset, libc::EOPNOTSUPP, "Landlock"),
        (libc::SYS_seccomp, libc::ENOSYS, "seccomp"),
        (libc::SYS_pidfd_getfd, libc::EPERM, "parent"),
    ] {
        let scratch = Scratch::new();
        let qmp = scratch.path("qmp");
        let chardev = format!("socket,id=qmp,path={qmp},server=on,wait=off");
        let args = ["daemon", "--chardev", &chardev, "--monitor", "qmp"];
        let mut running = start_without(call, error, &args);
        running.wait_for_socket(&qmp);
        Monitor::connect(&qmp).run("quit", &json!({}));
        let told = running.wait().code(0).stderr;
        assert!(told.contains("no sandbox: ") && told.contains(what), "{told}");
        let demanded = start_without(call, error, &["daemon", "--sandbox", "on"]);
        demanded.wait().code(1).says(&["--sandbox on", what]);
    }
}

#[test]
fn files_are_read_and_written_without_a_ring_too() {
    if !is_there() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, disk, qmp) = (scratch.path("base.raw"), scratch.path("disk.qcow2"), scratch.path("qmp"));
    make_raw(&raw, 4 * MIB, 6);
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &disk]);
    let blockdev = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}");
    let chardev = format!("socket,id=qmp,path={qmp},server=on,wait=off");
    let args =
        ["daemon", "--sandbox", "on", "--blockdev", &blockdev, "--chardev", &chardev, "--monitor", "qmp"];
    let mut running = start_without(libc::SYS_io_uring_setup, libc::EPERM, &args);
    running.wait_for_socket(&qmp);
    headwater(&["jobs", &qmp, "stream", "disk"]).code(0);
    headwater(&["jobs", &qmp, "watch"]).code(0);
    running.signal("TERM");
    running.wait().code(0);
    assert_streamed(&disk, &raw, "raw");
}

/// headwater on a system where a call fails.
fn start_without(call: libc::c_long, error: i32, args: &[&str]) -> Running {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.args(args).env("HEADWATER_LOG", "info");
    let fails = SeccompAction::Errno(error.cast_unsigned());
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new([(call, vec![])].into(), SeccompAction::Allow, fails, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    let apply = move || seccompiler::apply_filter(&program).map_err(std::io::Error::other);
    // SAFETY: between fork and exec only two system calls are made.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, apply) };
    Running::spawn(command)
}

#[test]
fn a_server_and_a_stream_run_no_programs_and_gain_nothing() {
    if !is_there() {
        return;
    }
    let scratch = Scratch::new();
    let (raw, disk) = (scratch.path("a.raw"), scratch.path("disk.qcow2"));
    make_raw(&raw, MIB, 1);
    let uri = scratch.uri("disk");
    let serve = ["serve", &raw, "--format", "raw", "--serve", &uri];
    for words in [&serve[..], &["stream", &raw, &disk, "--serve", &uri]] {
        let mut running = Running::start(words);
        running.wait_for_socket(&scratch.path("disk.sock"));
        let pid = running.pid();
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        for thread in threads.map(|thread| thread.unwrap().path().join("status")) {
            let thread = thread.to_str().unwrap();
            assert_eq!((&*field(thread, "Seccomp"), &*field(thread, "NoNewPrivs")), ("2", "1"), "{thread}");
        }
        running.signal("INT");
        running.wait();
    }
}
