//! What the tests of the network clients share.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod http;

use headwater_block::{BufferMut, Error, Node};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Runs a test on one thread, as a disk does; fails it if it takes too long.
pub(crate) fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    let test = async { tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs") };
    local.block_on(&runtime, test);
}

pub(crate) async fn read(node: &dyn Node, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
    node.read(offset, BufferMut::new(len)).await.map(|buf| buf.to_vec())
}

/// What nbdkit's pattern plugin holds: each 8 bytes hold their own offset, big-endian.
pub(crate) fn pattern(offset: u64, len: usize) -> Vec<u8> {
    let skip = (offset % 8) as usize;
    let mut bytes = vec![0; (skip + len).next_multiple_of(8)];
    for (word, at) in bytes.chunks_exact_mut(8).zip((offset - offset % 8..).step_by(8)) {
        word.copy_from_slice(&at.to_be_bytes());
    }
    bytes[skip..skip + len].to_vec()
}

/// A server program on a Unix socket; ended when dropped.
pub(crate) struct Server {
    child: Child,
    directory: tempfile::TempDir,
}

impl Server {
    /// Runs nbdkit with these arguments.
    pub(crate) fn nbdkit(args: &[&str]) -> Self {
        Self::start("nbdkit", |command, socket| {
            command.arg("-f").arg("--exit-with-parent").arg("-U").arg(socket).args(args);
        })
    }

    /// Runs nbdkit with these arguments, which make it listen on a port of this host.
    pub(crate) fn nbdkit_on_tcp(port: u16, args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("nbdkit");
        command.arg("-f").arg("--exit-with-parent").args(args).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Self { child: command.spawn().expect("nbdkit is needed for this test"), directory };
        wait_for(|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        server
    }

    /// Runs qemu-nbd with these arguments.
    pub(crate) fn qemu_nbd(args: &[&str]) -> Self {
        Self::start("qemu-nbd", |command, socket| {
            command.arg("-t").arg("-k").arg(socket).args(args);
        })
    }

    fn start(program: &str, arguments: impl FnOnce(&mut Command, &Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd");
        let mut command = Command::new(program);
        arguments(&mut command, &socket);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"));
        let server = Self { child, directory };
        wait_for(|| std::os::unix::net::UnixStream::connect(server.socket()).is_ok());
        server
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd")
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    pub(crate) fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks the server to end, and waits for that.
    pub(crate) fn terminate(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let _ = self.child.wait();
    }

    /// Runs nbdkit again on the same socket.
    pub(crate) fn restart_nbdkit(&mut self, args: &[&str]) {
        self.stop();
        let _ = std::fs::remove_file(self.socket());
        let mut command = Command::new("nbdkit");
        command.arg("-f").arg("--exit-with-parent").arg("-U").arg(self.socket()).args(args);
        self.child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn wait_for(it_listens: impl Fn() -> bool) {
    #[allow(clippy::disallowed_methods, reason = "a real program is waited for")]
    let start = Instant::now();
    while !it_listens() {
        assert!(start.elapsed() < Duration::from_secs(10), "the server does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
}
