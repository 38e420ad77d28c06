//! QMP as a program speaks it to the daemon.

use super::Running;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A connection to the daemon's monitor.
pub(crate) struct Monitor {
    stream: BufReader<UnixStream>,
    /// What was told and not yet asked for.
    events: Vec<Value>,
}

impl Monitor {
    #[track_caller]
    pub(crate) fn connect(path: &str) -> Self {
        Self::try_connect(path).unwrap_or_else(|err| panic!("{path}: {err}"))
    }

    /// Connects to a daemon that is starting. Of one that was killed a moment ago, the broker may still be listening: it greets nobody.
    #[track_caller]
    pub(crate) fn of(running: &mut Running, path: &str) -> Self {
        let mut monitor = None;
        running.wait_until(&format!("monitor at {path}"), |_| {
            monitor = Self::try_connect(path).ok();
            monitor.is_some()
        });
        monitor.expect("it was there")
    }

    /// As [`Monitor::connect`], to a daemon that may be gone at any moment.
    pub(crate) fn try_connect(path: &str) -> std::io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        // A command that isn't answered is a failure, not a test that never ends.
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut monitor = Self { stream: BufReader::new(stream), events: Vec::new() };
        monitor.receive()?;
        monitor.ask("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn receive(&mut self) -> std::io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 || !line.ends_with('\n') {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Sends a command, whose answer nobody waits for.
    pub(crate) fn send(&mut self, command: &str, arguments: &Value) -> std::io::Result<()> {
        // In one piece: after the last brace of `quit` nobody may be there to take more.
        let message = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.stream.get_mut().write_all(message.as_bytes())
    }

    /// Sends a command and gives its answer, whichever it is.
    pub(crate) fn ask(&mut self, command: &str, arguments: &Value) -> std::io::Result<Value> {
        self.send(command, arguments)?;
        loop {
            let answer = self.receive()?;
            if answer.get("event").is_none() {
                return Ok(answer);
            }
            self.events.push(answer);
        }
    }

    /// What a command returns, which must succeed.
    #[track_caller]
    pub(crate) fn run(&mut self, command: &str, arguments: &Value) -> Value {
        let answer = self.ask(command, arguments).expect("an answer in time");
        assert!(answer.get("error").is_none(), "{command} {arguments}: {answer}");
        answer["return"].clone()
    }

    /// Why a command is refused, which must not succeed.
    #[track_caller]
    pub(crate) fn refused(&mut self, command: &str, arguments: &Value) -> String {
        let answer = self.ask(command, arguments).expect("an answer in time");
        answer["error"]["desc"]
            .as_str()
            .unwrap_or_else(|| panic!("{command} {arguments}: {answer}"))
            .to_owned()
    }

    /// Waits until a job that must be dismissed has ended well, and dismisses it.
    #[track_caller]
    pub(crate) fn wait_for_job(&mut self, id: &str) {
        loop {
            let jobs = self.run("query-jobs", &json!({}));
            let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == id).expect("the job").clone();
            assert!(job.get("error").is_none(), "{job}");
            if job["status"] == "concluded" {
                self.run("job-dismiss", &json!({"id": id}));
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Nothing is waited for any longer than this.
    pub(crate) fn limit(&self, time: Duration) {
        self.stream.get_ref().set_read_timeout(Some(time)).expect("a limit");
    }

    /// Waits for the next event of this name, told before or not.
    pub(crate) fn event(&mut self, name: &str) -> std::io::Result<Value> {
        loop {
            let told = self.events.iter().position(|event| event["event"] == name);
            if let Some(at) = told {
                return Ok(self.events.drain(..=at).next_back().unwrap_or_default());
            }
            let next = self.receive()?;
            self.events.push(next);
        }
    }
}
