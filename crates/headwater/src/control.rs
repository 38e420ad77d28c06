//! The control socket of a running stream: one command a line, one line of answer to each.
//!
//! | command      | answer                                                              |
//! |--------------|---------------------------------------------------------------------|
//! | `rate BYTES` | `ok`; at most so many bytes are copied a second, 0 is without limit  |
//! | `guest-latency TIME` | `ok`; copies add so much to guests' requests at most (2ms), or what is `default` |
//! | `pause`      | `ok`; nothing is copied, the disk stays served                       |
//! | `resume`     | `ok`                                                                 |
//! | `cancel`     | `ok cancelled`, or `ok completed` if that came first                 |
//! | `status`     | `ok` and one JSON object, as `--json` prints them                    |
//!
//! Anything else is answered with `error` and what is wrong. Sizes are written as on the command line (`rate 50M`).
//! The socket can be reached by its owner only.

use crate::failure::{Failure, Outcome};
use crate::guest_latency;
use crate::size::parse_size;
use headwater_block::LocalFuture;
use headwater_job::GuestLatencyGoal;
use std::fmt;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

/// The longest line that is read; no command is nearly as long.
const MAX_LINE: u64 = 256;

/// What a stream can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Copy at most so many bytes a second; 0 is without limit.
    Rate(u64),
    /// What copies may add to guests' requests.
    GuestLatency(GuestLatencyGoal),
    /// Stop copying.
    Pause,
    /// Copy on.
    Resume,
    /// Give up.
    Cancel,
    /// Say how far it is.
    Status,
}

impl Command {
    /// Reads a line.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_ascii_whitespace();
        let command = match (words.next(), words.next()) {
            (Some("rate"), Some(rate)) => Self::Rate(parse_size(rate)?),
            (Some("rate"), None) => return Err("rate needs a number of bytes a second (rate 50M)".into()),
            (Some("guest-latency"), Some(time)) => Self::GuestLatency(guest_latency::parse(time)?),
            (Some("guest-latency"), None) => {
                return Err("guest-latency needs a time (2ms), or default".into());
            }
            (Some("pause"), None) => Self::Pause,
            (Some("resume"), None) => Self::Resume,
            (Some("cancel"), None) => Self::Cancel,
            (Some("status"), None) => Self::Status,
            _ => {
                return Err(format!(
                    "'{}' is not one of: rate BYTES, guest-latency TIME, pause, resume, cancel, status",
                    line.trim()
                ));
            }
        };
        if words.next().is_some() {
            return Err(format!("'{}' has a word too many", line.trim()));
        }
        Ok(command)
    }
}

/// As it is written on the wire.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate(rate) => write!(f, "rate {rate}"),
            Self::GuestLatency(goal) => write!(f, "guest-latency {}", guest_latency::text(*goal)),
            Self::Pause => f.write_str("pause"),
            Self::Resume => f.write_str("resume"),
            Self::Cancel => f.write_str("cancel"),
            Self::Status => f.write_str("status"),
        }
    }
}

/// Carries out commands: the text of the answer, or why not.
pub type Handler = Rc<dyn Fn(Command) -> LocalFuture<'static, Result<String, String>>>;

/// A listening control socket. Its file goes with it.
pub struct ControlSocket {
    path: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl ControlSocket {
    /// Listens at `path` and lets `handler` carry out what comes.
    ///
    /// # Errors
    /// If the socket can't be made there.
    pub fn bind(path: &Path, handler: Handler) -> Outcome<Self> {
        let shown = path.display();
        let listener = match UnixListener::bind(path) {
            Err(err) if err.kind() == ErrorKind::AddrInUse && is_left_over(path) => {
                std::fs::remove_file(path).and_then(|()| UnixListener::bind(path))
            }
            bound => bound,
        };
        let listener = listener.map_err(|err| match err.kind() {
            ErrorKind::AddrInUse => Failure::new(format!(
                "cannot make the control socket {shown}: it exists; choose another path"
            )),
            _ => Failure::new(format!("cannot make the control socket {shown}: {err}")),
        })?;
        let owner_only = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(path, owner_only).map_err(|err| {
            Failure::new(format!("cannot protect the control socket {}: {err}", path.display()))
        })?;
        let task = tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that goes away takes nothing with it.
                tokio::task::spawn_local(converse(stream, handler.clone()));
            }
        });
        Ok(Self { path: path.to_owned(), task })
    }
}

/// True if there is a socket at `path` to which nobody listens any more.
fn is_left_over(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let connected = std::os::unix::net::UnixStream::connect(path);
    is_socket && connected.is_err_and(|err| err.kind() == ErrorKind::ConnectionRefused)
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn converse(mut stream: UnixStream, handler: Handler) -> std::io::Result<()> {
    let (input, mut output) = stream.split();
    let mut input = BufReader::new(input);
    loop {
        let mut line = Vec::new();
        let read = (&mut input).take(MAX_LINE).read_until(b'\n', &mut line).await?;
        if read == 0 {
            return Ok(());
        }
        if read as u64 == MAX_LINE && line.last() != Some(&b'\n') {
            return output.write_all(b"error the line is too long\n").await;
        }
        let command = Command::parse(&String::from_utf8_lossy(&line));
        let answer = match command {
            Ok(command) => handler(command).await,
            Err(why) => Err(why),
        };
        let line = match answer {
            Ok(text) if text.is_empty() => "ok\n".to_owned(),
            Ok(text) => format!("ok {text}\n"),
            Err(why) => format!("error {}\n", why.replace('\n', " ")),
        };
        output.write_all(line.as_bytes()).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let goal = guest_latency::parse("2ms").unwrap();
        for command in [
            Command::Rate(7 << 20),
            Command::GuestLatency(goal),
            Command::Pause,
            Command::Resume,
            Command::Cancel,
            Command::Status,
        ] {
            assert_eq!(Command::parse(&command.to_string()), Ok(command));
        }
        assert_eq!(Command::parse(" rate 50M \r\n"), Ok(Command::Rate(50 << 20)));
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for line in ["", "rate", "rate x", "rate 1 2", "pause now", "quit", "\0"] {
            assert!(Command::parse(line).is_err(), "{line:?}");
        }
    }
}
