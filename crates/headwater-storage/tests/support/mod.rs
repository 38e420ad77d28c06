//! What the tests of the network clients share.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod http;

use headwater_block::{Buffer, BufferMut, Error, Node, WriteFlags};
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

/// Writes to a disk of at least 14 MiB and reads it, many requests at once. Afterwards 9 MiB from 4096 on hold the pattern's beginning.
pub(crate) async fn works_at_once(node: &dyn Node) {
    let data = pattern(0, 9 << 20);
    node.write(4096, Buffer::copy_of(&data), WriteFlags::default()).await.unwrap();
    let others = (0..32_u64).map(|i| {
        let data = &data;
        async move {
            let at = (i * 131_072) as usize;
            assert!(read(node, 4096 + at as u64, 131_072).await.unwrap()[..] == data[at..at + 131_072]);
            let at = (12 << 20) + i * 65536;
            let block = Buffer::copy_of(&[i as u8 + 1; 65536]);
            node.write(at, block, WriteFlags::default()).await.unwrap();
            assert_eq!(read(node, at, 65536).await.unwrap(), [i as u8 + 1; 65536]);
        }
    });
    futures_util::future::join_all(others).await;
    node.flush().await.unwrap();
}

/// A server program on a Unix socket; ended when dropped.
pub(crate) struct Server {
    child: Child,
    directory: tempfile::TempDir,
}

impl Server {
    /// Runs nbdkit with these arguments, on a Unix socket unless they say otherwise.
    pub(crate) fn nbdkit(args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let child = start_nbdkit(directory.path(), args);
        Self { child, directory }
    }

    /// Runs qemu-nbd with these arguments.
    pub(crate) fn qemu_nbd(args: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("qemu-nbd");
        command.arg("-t").arg("-k").arg(directory.path().join("nbd")).args(args);
        command.arg("--pid-file").arg(directory.path().join("pid"));
        let child = start(command, &directory.path().join("pid"));
        Self { child, directory }
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

    /// Whether the server has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Runs nbdkit again on the same socket.
    pub(crate) fn restart_nbdkit(&mut self, args: &[&str]) {
        self.stop();
        self.child = start_nbdkit(self.directory.path(), args);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn start_nbdkit(directory: &Path, args: &[&str]) -> Child {
    let (socket, pid) = (directory.join("nbd"), directory.join("pid"));
    for left_over in [&socket, &pid] {
        let _ = std::fs::remove_file(left_over);
    }
    let mut command = Command::new("nbdkit");
    command.arg("-f").arg("--exit-with-parent").arg("-P").arg(&pid);
    if !args.contains(&"-p") {
        command.arg("-U").arg(&socket);
    }
    command.args(args);
    start(command, &pid)
}

/// Runs a server that writes its process's number to `pid` once it listens.
fn start(mut command: Command, pid: &Path) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let child = command.spawn().unwrap_or_else(|e| panic!("{command:?} is needed for this test: {e}"));
    wait_for(|| std::fs::read(pid).is_ok_and(|text| text.ends_with(b"\n")), "the server does not start");
    child
}

fn wait_for(mut it_is_so: impl FnMut() -> bool, what_else: &str) {
    #[allow(clippy::disallowed_methods, reason = "a real program is waited for")]
    let start = Instant::now();
    while !it_is_so() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what_else}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
