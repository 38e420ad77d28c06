//! A running `qemu-storage-daemon` with a monitor on its standard input and output.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

pub(crate) const PROGRAM: &str = "qemu-storage-daemon";

pub(crate) struct Daemon {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Daemon {
    /// Starts one and leaves the negotiation to the caller; returns its greeting as well.
    pub(crate) fn greeted(monitor_options: &str) -> (Self, Vec<u8>) {
        let mut child = Command::new(PROGRAM)
            .args(["--chardev", "stdio,id=m,signal=off", "--monitor", &format!("chardev=m{monitor_options}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-storage-daemon is installed");
        let input = child.stdin.take().expect("stdin is piped");
        let output = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let mut daemon = Self { child, input, output };
        let greeting = daemon.message();
        (daemon, greeting)
    }

    /// Starts one that takes commands.
    pub(crate) fn start() -> Self {
        let (mut daemon, _) = Self::greeted("");
        assert_eq!(daemon.execute(&json!({ "execute": "qmp_capabilities" })), json!({ "return": {} }));
        daemon
    }

    /// Sends bytes as they are.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.input.write_all(bytes).expect("the daemon reads");
    }

    /// The bytes of the next message, which may have several lines.
    pub(crate) fn message(&mut self) -> Vec<u8> {
        let mut message = Vec::new();
        loop {
            let length = self.output.read_until(b'\n', &mut message).expect("the daemon writes");
            assert_ne!(length, 0, "the daemon ended after {:?}", String::from_utf8_lossy(&message));
            // A pretty message ends with a bracket at the beginning of a line.
            if message.starts_with(b"{\"") || message.ends_with(b"\n}\r\n") {
                return message;
            }
        }
    }

    /// Sends a request and waits for its response.
    pub(crate) fn execute(&mut self, request: &Value) -> Value {
        self.send(format!("{request}\n").as_bytes());
        serde_json::from_slice(&self.message()).expect("a response is JSON")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
