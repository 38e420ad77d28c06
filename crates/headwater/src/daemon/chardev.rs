//! Character devices: where monitors are reached. Sockets that listen or connect, and standard input and output.
//!
//! - `table`: all of them, by their ids. `ring`: bytes that are kept for whoever asks.
//!
//! With a sandbox, what is [behind](Backend) a device is with the broker, which hears what the operator says first ([`Desk`]).

mod backend;
mod ring;
mod stdio;
mod table;

pub(super) use self::backend::{Backend, Peer};
pub(super) use self::table::Chardevs;
use super::failure::{Refusal, generic};
use super::sandbox::Desk;
use headwater_qmp::opts;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::thread::JoinHandle;
pub(super) use stdio::input as standard_input;
use tokio::io::{AsyncRead, AsyncWrite};

/// Two directions to a client.
pub(super) struct Connection {
    pub(super) input: Box<dyn AsyncRead + Unpin>,
    pub(super) output: Box<dyn AsyncWrite + Unpin>,
}

impl Connection {
    pub(super) fn new(
        (input, output): (impl AsyncRead + Unpin + 'static, impl AsyncWrite + Unpin + 'static),
    ) -> Self {
        Self { input: Box::new(input), output: Box::new(output) }
    }
}

/// Who has what is behind a device.
enum Source {
    Here(Backend),
    Broker(Desk),
}

/// A character device.
pub(super) struct Chardev {
    pub(super) id: String,
    stdio: bool,
    filename: String,
    source: Source,
    /// What writes to standard output.
    writer: RefCell<Option<JoinHandle<()>>>,
    /// A monitor has it.
    taken: Cell<bool>,
}

impl Chardev {
    /// Makes a device as `--chardev` asks, at the broker's `desk` if there is one. Waits for a client where that was asked for.
    ///
    /// # Errors
    /// Options that don't fit together, and what the system says.
    pub(super) async fn open(asked: &opts::Chardev, desk: Option<Desk>) -> Result<Rc<Self>, Refusal> {
        let (source, filename) = match desk {
            Some(desk) => {
                let filename = desk.open().await?;
                (Source::Broker(desk), filename)
            }
            None => {
                let backend = Backend::open(asked).await?;
                let filename = backend.filename();
                (Source::Here(backend), filename)
            }
        };
        Ok(Rc::new(Self {
            id: asked.id.clone(),
            stdio: asked.backend.get("type").is_some_and(|kind| kind == "stdio"),
            filename,
            source,
            writer: RefCell::default(),
            taken: Cell::new(false),
        }))
    }

    /// Gives it to a monitor, which must be the only one.
    ///
    /// # Errors
    /// If another has it.
    pub(super) fn take(&self) -> Result<(), Refusal> {
        if self.taken.replace(true) {
            return Err(generic(format!("chardev '{}' is already in use", self.id)));
        }
        Ok(())
    }

    /// True if a monitor has it.
    pub(super) fn is_taken(&self) -> bool {
        self.taken.get()
    }

    /// True for standard input and output, which there is one of.
    pub(super) fn is_stdio(&self) -> bool {
        self.stdio
    }

    /// The next connection; none if there can be no more.
    pub(super) async fn connection(&self) -> Option<Connection> {
        let made = match &self.source {
            Source::Here(backend) => match backend.peer().await? {
                Peer::Unix(stream) => Ok(Connection::new(stream.into_split())),
                Peer::Tcp(stream) => Ok(Connection::new(stream.into_split())),
                Peer::Stdio => {
                    stdio::input().and_then(|input| Ok(Connection::new((input, self.standard_output()?))))
                }
            },
            Source::Broker(desk) => desk.connection(|| self.standard_output()).await.transpose()?,
        };
        made.inspect_err(|err| tracing::error!("chardev {}: {err}", self.id)).ok()
    }

    fn standard_output(&self) -> std::io::Result<tokio::net::UnixStream> {
        let (output, writer) = stdio::output()?;
        self.writer.replace(Some(writer));
        Ok(output)
    }

    /// Waits until what was sent has left. The connections are closed already.
    pub(super) fn finish(&self) {
        if let Some(writer) = self.writer.take() {
            // It can only have panicked, which it has told of.
            let _ = writer.join();
        }
    }

    /// What `query-chardev` tells of it.
    pub(super) fn filename(&self) -> String {
        self.filename.clone()
    }
}
