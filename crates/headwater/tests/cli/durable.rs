//! Jobs that go on after the process that worked on them was killed: `headwater daemon --state-dir`, and `headwater stream` by itself.

use crate::common::http::{Fault, HttpServer};
use crate::common::monitor::Monitor;
use crate::common::*;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// A disk over a raw image of 16 MiB, and the daemon that is started on it again and again.
struct Place {
    scratch: Scratch,
    raw: String,
    disk: String,
}

impl Place {
    fn new(seed: u64) -> Self {
        let scratch = Scratch::new();
        let (raw, disk) = (scratch.path("base.raw"), scratch.path("disk.qcow2"));
        make_raw(&raw, 16 * MIB, seed);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &disk]);
        Self { scratch, raw, disk }
    }

    fn blockdev(&self) -> String {
        format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={}", self.disk)
    }

    /// The state file of job `fill`.
    fn record(&self) -> String {
        self.scratch.path("state/fill.job")
    }

    fn command_line(&self, blockdevs: &[&str]) -> Vec<String> {
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", self.scratch.path("qmp"));
        let state = self.scratch.path("state");
        let mut line = ["daemon", "--state-dir", &state, "--chardev", &chardev, "--monitor", "qmp"]
            .map(str::to_owned)
            .to_vec();
        line.extend(blockdevs.iter().flat_map(|blockdev| ["--blockdev".to_owned(), (*blockdev).to_owned()]));
        line
    }

    /// Starts the daemon with these nodes.
    fn start_with(&self, blockdevs: &[&str]) -> (Running, Monitor) {
        let mut running = Running::start(&self.command_line(blockdevs));
        let monitor = Monitor::of(&mut running, &self.scratch.path("qmp"));
        (running, monitor)
    }

    fn start(&self) -> (Running, Monitor) {
        self.start_with(&[&self.blockdev()])
    }

    /// Starts the daemon, which must not come up.
    #[track_caller]
    fn refused(&self) -> Ended {
        Running::start(&self.command_line(&[&self.blockdev()])).wait().code(1)
    }

    /// A daemon that was killed while it streamed.
    fn killed(&self) {
        let (running, mut monitor) = self.start();
        monitor.run("block-stream", &json!({"job-id": "fill", "device": "disk", "speed": MIB}));
        running.kill();
        assert!(Path::new(&self.record()).exists());
    }
}

fn jobs(monitor: &mut Monitor) -> Vec<Value> {
    monitor.run("query-block-jobs", &json!({})).as_array().unwrap().clone()
}

/// Waits until job `fill` is completed.
fn completed(monitor: &mut Monitor) {
    monitor.run("block-job-set-speed", &json!({"device": "fill", "speed": 0}));
    let end = monitor.event("BLOCK_JOB_COMPLETED").unwrap();
    assert!(end["data"]["error"].is_null(), "{end}");
}

fn end(running: Running) {
    running.signal("TERM");
    running.wait().code(0);
}

#[test]
fn a_stream_goes_on_by_itself_with_its_id_and_its_speed() {
    let place = Place::new(1);
    place.killed();
    let (running, mut monitor) = place.start();
    let job = &jobs(&mut monitor)[0];
    assert_eq!((job["device"].as_str(), job["speed"].as_u64()), (Some("fill"), Some(MIB)), "{job}");
    let taken = monitor.refused("block-stream", &json!({"job-id": "fill", "device": "disk"}));
    assert!(taken.contains("busy"), "{taken}");
    monitor.run("block-job-set-speed", &json!({"device": "fill", "speed": 3 * MIB}));
    monitor.run("job-pause", &json!({"id": "fill"}));
    running.kill();

    let (running, mut monitor) = place.start();
    let job = jobs(&mut monitor).remove(0);
    assert_eq!((job["speed"].as_u64(), job["status"].as_str()), (Some(3 * MIB), Some("paused")), "{job}");
    monitor.run("job-resume", &json!({"id": "fill"}));
    running.kill();

    let (running, mut monitor) = place.start();
    assert_eq!(jobs(&mut monitor)[0]["status"], "running");
    // An end in order is no wish to give the job up.
    end(running);
    assert!(Path::new(&place.record()).exists());
    let (running, mut monitor) = place.start();
    completed(&mut monitor);
    assert!(!Path::new(&place.record()).exists());
    end(running);
    assert_streamed(&place.disk, &place.raw, "raw");
}

#[test]
fn a_job_that_was_cancelled_does_not_come_back() {
    let place = Place::new(2);
    place.killed();
    let (running, mut monitor) = place.start();
    monitor.run("job-pause", &json!({"id": "fill"}));
    monitor.run("job-cancel", &json!({"id": "fill"}));
    assert!(!Path::new(&place.record()).exists());
    running.kill();
    let (running, mut monitor) = place.start();
    assert_eq!(jobs(&mut monitor), [] as [Value; 0]);
    end(running);
}

#[test]
fn a_source_that_has_changed_is_not_mixed_into_the_disk() {
    let place = Place::new(3);
    place.killed();
    let kept = place.scratch.path("kept.raw");
    tool("cp", &["-p", &place.raw, &kept]);
    make_raw(&place.raw, 16 * MIB, 77);
    let ended = place.refused().says(&[
        "base.raw has changed",
        "job 'fill'",
        "time of modification",
        &place.record(),
    ]);
    assert!(ended.stderr.contains("remove"), "{}", ended.stderr);
    // It is left out of other daemons' commands as well.
    let (running, mut monitor) = place.start_with(&[]);
    let disk =
        json!({"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": place.disk}});
    let refused = monitor.refused("blockdev-add", &disk);
    assert!(refused.contains("has changed"), "{refused}");
    assert_eq!(monitor.run("query-named-block-nodes", &json!({})), json!([]));
    end(running);
    std::fs::rename(&kept, &place.raw).unwrap();
    let (running, mut monitor) = place.start();
    completed(&mut monitor);
    end(running);
    assert_streamed(&place.disk, &place.raw, "raw");
}

#[test]
fn an_export_is_known_by_its_ends() {
    let place = Place::new(4);
    let (socket, raw) = (place.scratch.path("far.sock"), place.raw.as_str());
    let backing = format!(
        "backing.driver=raw,backing.file.driver=nbd,backing.file.server.type=unix,backing.file.server.path={socket}"
    );
    let blockdev = format!("{},{backing}", place.blockdev());
    let server = Background::nbdkit(&socket, &["file", raw]);
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    monitor.run("block-stream", &json!({"job-id": "fill", "device": "disk", "speed": MIB}));
    running.kill();
    drop(server);
    let mut bytes = read_file(raw);
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(raw, &bytes).unwrap();
    let server = Background::nbdkit(&socket, &["file", raw]);
    let line = place.command_line(&[&blockdev]);
    Running::start(&line).wait().code(1).says(&["has changed", "first and last bytes"]);
    drop(server);
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(raw, &bytes).unwrap();
    let _server = Background::nbdkit(&socket, &["file", raw]);
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    completed(&mut monitor);
    end(running);
    assert_streamed(&place.disk, raw, "raw");
}

#[test]
fn useless_state_is_told_of_and_left() {
    let place = Place::new(5);
    place.killed();
    let good = String::from_utf8(read_file(&place.record())).unwrap();
    let half = good[..good.len() / 2].to_owned();
    let newer = good.replace("\"version\": 1", "\"version\": 7");
    let other_command = good.replace("block-stream", "quit");
    let wrong_argument = good.replace("\"device\"", "\"devise\"");
    let another_id = good.replace("\"fill\"", "\"other\"");
    for (text, why) in [
        ("", "damaged"),
        (half.as_str(), "damaged"),
        ("{\"a\": 1}", "isn't a state file of headwater"),
        (newer.as_str(), "version 7"),
        (other_command.as_str(), "not one that the daemon started"),
        (wrong_argument.as_str(), "its arguments are wrong"),
        (another_id.as_str(), "its file was renamed"),
    ] {
        std::fs::write(place.record(), text).unwrap();
        let (running, mut monitor) = place.start();
        assert_eq!(jobs(&mut monitor), [] as [Value; 0]);
        // The name is not given to another job as long as the file is there.
        let taken = monitor.refused("block-stream", &json!({"job-id": "fill", "device": "disk"}));
        assert!(taken.contains(&place.record()), "{taken}");
        running.signal("TERM");
        let ended = running.wait().code(0);
        assert!(
            ended.stderr.contains(why) && ended.stderr.contains(&place.record()),
            "{why}: {}",
            ended.stderr
        );
        assert_eq!(read_file(&place.record()), text.as_bytes());
    }
    std::fs::write(place.record(), good).unwrap();
    let (running, mut monitor) = place.start();
    completed(&mut monitor);
    end(running);
}

#[test]
fn a_record_of_another_disk_starts_nothing() {
    let place = Place::new(6);
    place.killed();
    // As large, over the same source, under the same name.
    std::fs::rename(&place.disk, place.scratch.path("old.qcow2")).unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", &place.disk]);
    let (running, mut monitor) = place.start();
    assert_eq!(jobs(&mut monitor), [] as [Value; 0]);
    assert!(running.err().contains("another disk") && running.err().contains("inode"), "{}", running.err());
    assert!(Path::new(&place.record()).exists());
    end(running);
}

#[test]
fn a_job_that_was_complete_is_known_as_such() {
    let place = Place::new(7);
    place.killed();
    let record = read_file(&place.record());
    let (running, mut monitor) = place.start();
    completed(&mut monitor);
    end(running);
    // As a kill between the change of the link and the end of the record leaves it.
    std::fs::write(place.record(), record).unwrap();
    std::fs::remove_file(&place.raw).unwrap();
    let (running, mut monitor) = place.start();
    assert_eq!(jobs(&mut monitor), [] as [Value; 0]);
    assert!(!Path::new(&place.record()).exists());
    assert_eq!(running.err(), "");
    end(running);
}

#[test]
fn a_job_waits_for_nodes_that_come_later() {
    let place = Place::new(8);
    place.killed();
    let (running, mut monitor) = place.start_with(&[]);
    assert!(running.err().contains("goes on when there is a node 'disk'"), "{}", running.err());
    let base =
        json!({"driver": "raw", "node-name": "base", "file": {"driver": "file", "filename": place.raw}});
    monitor.run("blockdev-add", &base);
    assert_eq!(jobs(&mut monitor), [] as [Value; 0]);
    let file = json!({"driver": "file", "filename": place.disk});
    monitor.run(
        "blockdev-add",
        &json!({"driver": "qcow2", "node-name": "disk", "backing": "base", "file": file}),
    );
    assert_eq!(jobs(&mut monitor)[0]["device"], "fill");
    completed(&mut monitor);
    end(running);
    assert_streamed(&place.disk, &place.raw, "raw");
}

#[test]
fn one_state_directory_serves_one_daemon() {
    let place = Place::new(9);
    let (running, _monitor) = place.start();
    let line = ["daemon".to_owned(), "--state-dir".to_owned(), place.scratch.path("state")];
    headwater(&line).code(1).says(&["state", "in use by another headwater"]);
    end(running);
}

#[test]
fn a_commit_and_a_stream_of_a_part_go_on_too() {
    let place = Place::new(10);
    let layer = |name: &str, below: &str, format: &str| {
        let path = place.scratch.path(name);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", format, &path]);
        path
    };
    let middle = layer("middle.qcow2", "base.raw", "raw");
    tool("qemu-io", &["-c", "write -P 7 1M 8M", &middle]);
    let upper = layer("upper.qcow2", "middle.qcow2", "qcow2");
    tool("qemu-io", &["-c", "write -P 8 2M 4M", &upper]);
    let top = layer("top.qcow2", "upper.qcow2", "qcow2");
    let (whole, found) = (place.scratch.path("whole.raw"), place.scratch.path("found.raw"));
    tool("qemu-img", &["convert", "-O", "raw", &top, &whole]);
    let blockdev = format!("driver=qcow2,node-name=disk,file.driver=file,file.filename={top}");

    let commit = json!({"job-id": "fill", "device": "disk", "top": upper, "base": middle, "speed": MIB});
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    monitor.run("block-commit", &commit);
    running.kill();
    // Another base of the same name is not written to.
    let kept = place.scratch.path("kept.qcow2");
    std::fs::rename(&middle, &kept).unwrap();
    std::fs::copy(&kept, &middle).unwrap();
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    assert_eq!(jobs(&mut monitor), [] as [Value; 0]);
    assert!(
        running.err().contains("another disk") && running.err().contains("middle.qcow2"),
        "{}",
        running.err()
    );
    end(running);
    std::fs::rename(&kept, &middle).unwrap();
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    assert_eq!(jobs(&mut monitor)[0]["type"], "commit");
    completed(&mut monitor);
    running.kill();

    let stream = json!({"job-id": "fill", "device": "disk", "base": place.raw, "speed": MIB});
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    monitor.run("block-stream", &stream);
    running.kill();
    let record = read_file(&place.record());
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    assert_eq!(jobs(&mut monitor)[0]["type"], "stream");
    completed(&mut monitor);
    running.kill();
    std::fs::write(place.record(), record).unwrap();
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    assert_eq!(jobs(&mut monitor), [] as [Value; 0]);
    assert!(!Path::new(&place.record()).exists());
    end(running);
    let info = tool("qemu-img", &["info", "--output=json", &top]);
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["full-backing-filename"], place.raw.as_str(), "{info}");
    tool("qemu-img", &["convert", "-O", "raw", &top, &found]);
    assert!(read_file(&whole) == read_file(&found));
}

#[test]
fn a_source_that_changes_at_work_is_not_opened_by_the_next_daemon() {
    let place = Place::new(17);
    let server = HttpServer::start(read_file(&place.raw), Fault::ChangesEtag, Duration::ZERO);
    let backing = format!("backing.driver=raw,backing.file.driver=http,backing.file.url={}", server.url);
    let blockdev = format!("{},{backing}", place.blockdev());
    let (running, mut monitor) = place.start_with(&[&blockdev]);
    monitor.run("block-stream", &json!({"job-id": "fill", "device": "disk", "speed": 4 * MIB}));
    server.turn();
    let end = monitor.event("BLOCK_JOB_COMPLETED").unwrap();
    assert!(end["data"]["error"].as_str().is_some_and(|error| error.contains("ETag")), "{end}");
    running.kill();
    let ended = Running::start(&place.command_line(&[&blockdev])).wait().code(1);
    ended.says(&["has changed", "its ETag was \"one\" and is \"two\"", &place.record()]);
}

/// A layer that was in use when the job began is not taken for changed by what was only in memory then.
#[test]
fn a_layer_that_guests_wrote_until_the_job_began_is_known_again() {
    for signal in ["KILL", "TERM"] {
        let place = Place::new(16);
        let over = place.scratch.path("over.qcow2");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", &over]);
        let (running, mut monitor) = place.start();
        let server = json!({"type": "unix", "data": {"path": place.scratch.path("disk.sock")}});
        monitor.run("nbd-server-start", &json!({"addr": server}));
        let export = json!({"type": "nbd", "id": "e", "node-name": "disk", "writable": true});
        monitor.run("block-export-add", &export);
        // What was freed has lower refcounts in memory only.
        let script = "h.pwrite(b'x' * 3000000, 1234567)\nh.flush()\nh.trim(1<<20, 2<<20)\nh.flush()\nh.pwrite(b'y', 5<<20)";
        nbdsh(&place.scratch.uri("disk"), script);
        monitor.run("block-export-del", &json!({"id": "e", "mode": "hard"}));
        monitor.event("BLOCK_EXPORT_DELETED").unwrap();
        let file = json!({"driver": "file", "filename": over});
        let overlay = json!({"driver": "qcow2", "node-name": "over", "backing": "disk", "file": file});
        monitor.run("blockdev-add", &overlay);
        monitor.run("block-stream", &json!({"job-id": "fill", "device": "over", "speed": 8 * MIB}));
        running.signal(signal);
        running.wait();
        let blockdev = format!("driver=qcow2,node-name=over,file.driver=file,file.filename={over}");
        let (running, mut monitor) = place.start_with(&[&blockdev]);
        assert_eq!(jobs(&mut monitor)[0]["device"], "fill");
        completed(&mut monitor);
        end(running);
        tool("qemu-img", &["compare", &over, &place.disk]);
        assert_no_errors(&over);
    }
}

/// `headwater stream` on a place, slow enough to be killed.
fn stream(place: &Place, source: &str, more: &[&str]) -> Vec<String> {
    let control = place.scratch.path("control");
    let mut line =
        ["stream", source, &place.disk, "--json", "--control", &control].map(str::to_owned).to_vec();
    line.extend(more.iter().map(|word| (*word).to_owned()));
    line
}

#[test]
fn a_stream_keeps_the_rate_that_was_set_and_stays_paused() {
    let place = Place::new(11);
    std::fs::remove_file(&place.disk).unwrap();
    let (control, record) = (place.scratch.path("control"), place.scratch.path(".disk.qcow2.headwater"));
    let line = stream(&place, &place.raw, &["--rate", "1M"]);
    let status = || headwater(&["ctl", &control, "status"]).code(0).last_json();
    let mut running = Running::start(&line);
    running.wait_for_socket(&control);
    headwater(&["ctl", &control, "rate", "2M"]).code(0);
    headwater(&["ctl", &control, "pause"]).code(0);
    running.kill();
    let mut running = Running::start(&line);
    running.wait_for_socket(&control);
    let now = status();
    assert_eq!((now["rate_limit"].as_u64(), now["state"].as_str()), (Some(2 * MIB), Some("paused")), "{now}");
    assert!(running.err().contains("it is paused") && running.err().contains("ctl"), "{}", running.err());
    headwater(&["ctl", &control, "resume"]).code(0);
    running.signal("INT");
    running.wait().code(130);
    assert!(Path::new(&record).exists());
    // Another rate on the command line is a new wish.
    let line = stream(&place, &place.raw, &["--rate", "3M"]);
    let mut running = Running::start(&line);
    running.wait_for_socket(&control);
    assert_eq!(status()["rate_limit"].as_u64(), Some(3 * MIB));
    headwater(&["ctl", &control, "rate", "0"]).code(0);
    running.wait().code(0);
    assert!(!Path::new(&record).exists());
    assert_streamed(&place.disk, &place.raw, "raw");
}

#[test]
fn a_stream_refuses_a_source_that_changed_between_two_runs() {
    let place = Place::new(12);
    let record = place.scratch.path(".disk.qcow2.headwater");
    let line = stream(&place, &place.raw, &["--rate", "1M"]);
    let mut running = Running::start(&line);
    running.wait_until("record", |_| Path::new(&record).exists());
    running.kill();
    tool("touch", &["-d", "@1700000000", &place.raw]);
    let ended = headwater(&line).code(1).says(&[
        "base.raw has changed",
        "disk.qcow2 was begun",
        ".disk.qcow2.headwater",
    ]);
    assert_eq!(ended.last_json()["result"], "failed");
    // The operator knows better.
    std::fs::remove_file(&record).unwrap();
    headwater(&stream(&place, &place.raw, &[])).code(0);
    assert_streamed(&place.disk, &place.raw, "raw");
}

#[test]
fn an_object_with_another_etag_is_another_source() {
    let place = Place::new(13);
    std::fs::remove_file(&place.disk).unwrap();
    let server = HttpServer::start(read_file(&place.raw), Fault::ChangesEtag, Duration::ZERO);
    let line = stream(&place, &server.url, &["--rate", "1M"]);
    let mut running = Running::start(&line);
    running.wait_for_status("copies", |status| status["copied"].as_u64() > Some(0));
    running.kill();
    server.turn();
    headwater(&line).code(1).says(&["has changed", "its ETag was \"one\" and is \"two\""]);
}

#[test]
fn a_directory_for_the_state_of_several_disks_keeps_them_apart() {
    let (place, other) = (Place::new(14), Place::new(15));
    let state = place.scratch.path("streams");
    let mut running = Running::start(&stream(&place, &place.raw, &["--rate", "1M", "--state-dir", &state]));
    let record = format!("{state}/disk.qcow2.job");
    running.wait_until("record", |_| Path::new(&record).exists());
    // Another disk of the same name, at the same time.
    headwater(&stream(&other, &other.raw, &["--state-dir", &state])).code(1).says(&[&record, &place.disk]);
    running.kill();
    std::fs::write(&record, "garbage").unwrap();
    headwater(&stream(&place, &place.raw, &["--state-dir", &state])).code(1).says(&[&record, "damaged"]);
    std::fs::remove_file(&record).unwrap();
    headwater(&stream(&place, &place.raw, &["--state-dir", &state])).code(0);
    assert!(!Path::new(&record).exists());
    assert_streamed(&place.disk, &place.raw, "raw");
}
