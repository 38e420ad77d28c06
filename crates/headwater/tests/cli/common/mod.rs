//! What the black-box tests share: the headwater binary as a process, other programs that play source, client or judge, and
//! images to work on. Nothing here links to headwater.

pub(crate) mod http;
pub(crate) mod monitor;
pub(crate) mod rogue;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime};
use wait4::Wait4;

pub(crate) const MIB: u64 = 1 << 20;

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

/// A directory of its own for one test.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::Builder::new().prefix("headwater-test-").tempdir().expect("a temporary directory"))
    }

    /// The path of `name` in it, as text because command lines are made of it.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("temporary directories have plain names").to_owned()
    }

    /// The URI of export `name` on the Unix socket `NAME.sock`.
    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.path(&format!("{name}.sock")))
    }
}

/// How a process ended, what it said, and what it cost.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// User and system time.
    pub(crate) cpu: Duration,
    /// The most memory that it had, in bytes.
    pub(crate) peak: u64,
}

impl Ended {
    /// Asserts the exit code.
    #[track_caller]
    pub(crate) fn code(self, expected: i32) -> Self {
        assert_eq!(self.code, Some(expected), "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr);
        self
    }

    /// Asserts that standard error ends with one line from headwater that holds all of `parts`.
    #[track_caller]
    pub(crate) fn says(self, parts: &[&str]) -> Self {
        let line = self.stderr.lines().last().unwrap_or_default();
        for part in parts {
            assert!(line.contains(part), "no {part:?} in the last line of:\n{}", self.stderr);
        }
        assert!(line.starts_with("headwater: "), "the last line isn't ours:\n{}", self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self
    }

    /// The last line of standard output as JSON.
    #[track_caller]
    pub(crate) fn last_json(&self) -> serde_json::Value {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|err| panic!("{err}: {line:?}\nstderr:\n{}", self.stderr))
    }
}

/// Runs headwater to its end.
#[track_caller]
pub(crate) fn headwater<S: AsRef<OsStr>>(args: &[S]) -> Ended {
    Running::start(args).wait()
}

/// A headwater process.
pub(crate) struct Running {
    child: Child,
    /// Somebody has waited for it: its number may be another process's by now.
    reaped: bool,
    stdout: File,
    stderr: File,
}

impl Running {
    #[track_caller]
    pub(crate) fn start<S: AsRef<OsStr>>(args: &[S]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
        command.args(args);
        Self::spawn(command)
    }

    /// Starts `command`, which is or becomes headwater. Its output goes to files, so that it never waits for a reader.
    #[track_caller]
    pub(crate) fn spawn(mut command: Command) -> Self {
        let (stdout, stderr) = (unnamed(), unnamed());
        command
            .stdin(Stdio::null())
            .stdout(stdout.try_clone().expect("clone"))
            .stderr(stderr.try_clone().expect("clone"));
        let child = command.spawn().unwrap_or_else(|err| panic!("{command:?}: {err}"));
        Self { child, reaped: false, stdout, stderr }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal (`INT`, `KILL`, ...).
    pub(crate) fn signal(&self, name: &str) {
        tool("kill", &["-s", name, &self.pid().to_string()]);
    }

    /// Waits until `ready` says so.
    #[track_caller]
    pub(crate) fn wait_until(&mut self, what: &str, mut ready: impl FnMut(&Self) -> bool) {
        let start = now();
        while !ready(self) {
            if let Some(status) = self.child.try_wait().expect("wait") {
                panic!("ended with {status} before {what}:\n{}{}", self.out(), self.err());
            }
            assert!(elapsed(start) < PATIENCE, "no {what}:\n{}{}", self.out(), self.err());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until someone listens at `socket`.
    #[track_caller]
    pub(crate) fn wait_for_socket(&mut self, socket: &str) {
        self.wait_until(&format!("socket {socket}"), |_| {
            std::os::unix::net::UnixStream::connect(socket).is_ok()
        });
    }

    /// Waits until the JSON lines so far satisfy `ready`.
    #[track_caller]
    pub(crate) fn wait_for_status(&mut self, what: &str, ready: impl Fn(&serde_json::Value) -> bool) {
        self.wait_until(what, |running| {
            running
                .out()
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .any(|value| ready(&value))
        });
    }

    pub(crate) fn out(&self) -> String {
        contents(&self.stdout)
    }

    pub(crate) fn err(&self) -> String {
        contents(&self.stderr)
    }

    /// True if it hasn't ended yet.
    pub(crate) fn is_alive(&self) -> bool {
        // Without reaping it: what it cost is known only to who waits for it.
        use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
        let how = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let pid = Pid::from_child(&self.child);
        waitid(WaitId::Pid(pid), how).expect("wait").is_none()
    }

    /// Waits for its end.
    #[track_caller]
    pub(crate) fn wait(mut self) -> Ended {
        let start = now();
        while self.is_alive() {
            assert!(elapsed(start) < PATIENCE, "it doesn't end:\n{}{}", self.out(), self.err());
            std::thread::sleep(Duration::from_millis(5));
        }
        let ended = self.child.wait4().expect("wait");
        self.reaped = true;
        Ended {
            code: ended.status.code(),
            stdout: self.out(),
            stderr: self.err(),
            cpu: ended.rusage.utime + ended.rusage.stime,
            peak: ended.rusage.maxrss,
        }
    }

    /// Kills it at once, as a power cut would.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The time for tests, which have no disk's clock.
#[expect(clippy::disallowed_methods, reason = "a black-box test waits in real time")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

pub(crate) fn elapsed(start: SystemTime) -> Duration {
    start.elapsed().unwrap_or_default()
}

fn unnamed() -> File {
    tempfile::tempfile().expect("a temporary file")
}

/// What was written to `file`, whose position the writer shares.
fn contents(mut file: &File) -> String {
    let len = file.metadata().expect("metadata").len();
    let mut bytes = vec![0; len as usize];
    let read = file.read_at(&mut bytes, 0).unwrap_or(0);
    bytes.truncate(read);
    let _ = file.flush();
    // In place: what a test has in memory counts for the processes that it starts, too, when it asks for their peak.
    String::from_utf8(bytes).unwrap_or_else(|err| String::from_utf8_lossy(err.as_bytes()).into_owned())
}

/// Runs a program that must succeed, and gives its standard output.
#[track_caller]
pub(crate) fn tool<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    let output = tool_output(program, args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    assert!(
        output.status.success(),
        "{program} {args:?} ended with {}:\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Runs a program.
#[track_caller]
pub(crate) fn tool_output<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Output {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    command.output().unwrap_or_else(|err| panic!("cannot run {program}: {err}; scripts/setup installs it"))
}

/// Runs a script with libnbd's Python bindings and `h` connected to `uri`. They are Debian's, so its own Python runs them.
#[track_caller]
pub(crate) fn nbdsh(uri: &str, script: &str) -> String {
    let script = format!("h.add_meta_context('base:allocation')\nh.connect_uri('{uri}')\n{script}");
    tool("/usr/bin/python3", &["-m", "nbd", "-c", &script])
}

/// Another program in the background, which ends with this.
pub(crate) struct Background(Child);

impl Background {
    #[track_caller]
    pub(crate) fn start<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Self {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        Self(
            command
                .spawn()
                .unwrap_or_else(|err| panic!("cannot run {program}: {err}; scripts/setup installs it")),
        )
    }

    /// Sends a signal (`STOP`, `CONT`, ...).
    pub(crate) fn signal(&self, name: &str) {
        tool("kill", &["-s", name, &self.0.id().to_string()]);
    }

    /// nbdkit at a Unix socket, ready to be connected to.
    #[track_caller]
    pub(crate) fn nbdkit<S: AsRef<str>>(socket: &str, args: &[S]) -> Self {
        let _ = std::fs::remove_file(socket);
        let mut all = vec!["--foreground", "--exit-with-parent", "--unix", socket];
        all.extend(args.iter().map(AsRef::as_ref));
        let this = Self::start("nbdkit", &all);
        wait_for_file(socket);
        this
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
pub(crate) fn wait_for_file(path: &str) {
    let start = now();
    while !Path::new(path).exists() {
        assert!(elapsed(start) < PATIENCE, "{path} doesn't appear");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Makes a raw file of `size` bytes in which runs of data, of written zeroes and of holes follow each other. The data depend on
/// the offset and on `seed`.
pub(crate) fn make_raw(path: &str, size: u64, seed: u64) -> PathBuf {
    let file = File::create(path).expect("create");
    file.set_len(size).expect("set_len");
    const RUN: u64 = 300_000;
    let mut at = 0;
    while at < size {
        let len = RUN.min(size - at);
        match (at / RUN) % 5 {
            0..3 => file.write_all_at(&noise(seed ^ at, len as usize), at).expect("write"),
            3 => file.write_all_at(&vec![0; len as usize], at).expect("write"),
            _ => {}
        }
        at += len;
    }
    path.into()
}

/// Bytes that look random and follow from `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(len.div_ceil(8)).flatten().take(len).collect()
}

/// A qcow2 image with the contents of a raw file.
#[track_caller]
pub(crate) fn to_qcow2(raw: &str, qcow2: &str) {
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", raw, qcow2]);
}

/// Asserts that `disk` stands alone, is sound, and reads as `source`.
#[track_caller]
pub(crate) fn assert_streamed(disk: &str, source: &str, source_format: &str) {
    assert_sound(disk);
    let info: serde_json::Value =
        serde_json::from_str(&tool("qemu-img", &["info", "--output=json", disk])).expect("JSON");
    assert!(info.get("backing-filename").is_none(), "{disk} still has a backing file: {info}");
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", source_format, disk, source]);
}

/// Asserts that qemu-img finds neither errors nor leaks.
#[track_caller]
pub(crate) fn assert_sound(disk: &str) {
    tool("qemu-img", &["check", "-q", &alone(disk)]);
}

/// Asserts that qemu-img finds no errors. Leaks are allowed after a kill, and when space ran out.
#[track_caller]
pub(crate) fn assert_no_errors(disk: &str) {
    let mut check = tool_output("qemu-img", &["check", "-q", &alone(disk)]);
    // The kernel takes the ring of a killed process down, and its locks with it, some time after the process is gone.
    for _ in 0..100 {
        if !String::from_utf8_lossy(&check.stderr).contains("Failed to get") {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
        check = tool_output("qemu-img", &["check", "-q", &alone(disk)]);
    }
    assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
}

/// The image without its backing, which qemu-img might not be able to reach.
fn alone(disk: &str) -> String {
    format!(r#"json:{{"driver":"qcow2","backing":null,"file":{{"driver":"file","filename":"{disk}"}}}}"#)
}

/// The bytes that a file really takes on disk.
pub(crate) fn allocated(path: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).expect("metadata").blocks() * 512
}

/// The whole of a file.
pub(crate) fn read_file(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .unwrap_or_else(|err| panic!("{path}: {err}"));
    bytes
}

/// A port nobody uses at the moment.
pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    listener.local_addr().expect("address").port()
}
