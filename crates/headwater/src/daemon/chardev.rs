//! Character devices: where monitors are reached. Sockets that listen or connect, and standard input and output.

use super::failure::{Refusal, generic};
use super::graph::open::{Options, Read as _};
use super::sources::port;
use headwater_qmp::opts;
use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Two directions to a client.
pub(super) struct Connection {
    pub(super) input: Box<dyn AsyncRead + Unpin>,
    pub(super) output: Box<dyn AsyncWrite + Unpin>,
}

impl Connection {
    fn tcp(stream: TcpStream) -> Self {
        // Answers are small and somebody waits for them.
        let _ = stream.set_nodelay(true);
        let (input, output) = stream.into_split();
        Self { input: Box::new(input), output: Box::new(output) }
    }

    fn unix(stream: UnixStream) -> Self {
        let (input, output) = stream.into_split();
        Self { input: Box::new(input), output: Box::new(output) }
    }
}

enum Address {
    Unix(PathBuf),
    Tcp(String, u16),
}

enum Kind {
    UnixServer(UnixListener, PathBuf),
    TcpServer(TcpListener),
    Client {
        address: Address,
        reconnect: Option<Duration>,
    },
    Stdio,
    /// Nobody ever comes.
    Null,
}

/// A character device.
pub(super) struct Chardev {
    pub(super) id: String,
    kind: Kind,
    /// The connection that was made at the start: a client's, or the one that a server waited for.
    first: RefCell<Option<Connection>>,
    used_up: Cell<bool>,
    /// What writes to standard output.
    writer: RefCell<Option<JoinHandle<()>>>,
    /// A monitor has it.
    taken: Cell<bool>,
}

impl Drop for Chardev {
    fn drop(&mut self) {
        if let Kind::UnixServer(_, path) = &self.kind {
            // If it is gone already, so much the better.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Chardev {
    /// Makes a device as `--chardev` asks: `socket,id=c,path=/run/qmp,server=on,wait=off`. Waits for a client where that was asked for.
    ///
    /// # Errors
    /// Options that don't fit together, and what the system says.
    pub(super) async fn open(asked: &opts::Chardev) -> Result<Rc<Self>, Refusal> {
        let empty = Options::new();
        let backend = asked.backend.as_object().unwrap_or(&empty);
        let data = backend.object("data").unwrap_or(&empty);
        let kind = match backend.text("type").unwrap_or_default() {
            "stdio" => Kind::Stdio,
            "null" => Kind::Null,
            "socket" => socket(data).await?,
            other => {
                return Err(generic(format!("chardev: '{other}' is not supported; use socket or stdio")));
            }
        };
        let device = Self {
            id: asked.id.clone(),
            kind,
            first: RefCell::default(),
            used_up: Cell::new(false),
            writer: RefCell::default(),
            taken: Cell::new(false),
        };
        match &device.kind {
            Kind::UnixServer(..) | Kind::TcpServer(_) if data.flag("wait").unwrap_or(true) => {
                tracing::info!("waiting for a connection to chardev {}", device.id);
                let connection = device.accept().await;
                device.first.replace(connection);
            }
            Kind::Client { address, reconnect: None } => {
                let connection = connect(address).await.map_err(|err| {
                    let name = shown(address);
                    generic(format!(
                        "Failed to connect to '{}': {}",
                        name.trim_start_matches("unix:"),
                        errno(&err)
                    ))
                })?;
                device.first.replace(Some(connection));
            }
            _ => {}
        }
        Ok(Rc::new(device))
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

    /// True for standard input and output, which there is one of.
    pub(super) fn is_stdio(&self) -> bool {
        matches!(self.kind, Kind::Stdio)
    }

    /// The next connection; none if there can be no more.
    pub(super) async fn connection(&self) -> Option<Connection> {
        if let Some(first) = self.first.take() {
            self.used_up.set(true);
            return Some(first);
        }
        match &self.kind {
            Kind::UnixServer(..) | Kind::TcpServer(_) => self.accept().await,
            Kind::Client { address, reconnect: Some(pause) } => loop {
                if self.used_up.replace(true) {
                    tokio::time::sleep(*pause).await;
                }
                if let Ok(connection) = connect(address).await {
                    return Some(connection);
                }
            },
            Kind::Client { .. } | Kind::Null => None,
            Kind::Stdio if self.used_up.replace(true) => None,
            Kind::Stdio => match self.stdio() {
                Ok(connection) => Some(connection),
                Err(err) => {
                    tracing::error!("chardev {}: {err}", self.id);
                    None
                }
            },
        }
    }

    /// Standard input and output may be anything, files too, so threads of their own read and write them. The one that reads may be reading
    /// when the program ends.
    fn stdio(&self) -> std::io::Result<Connection> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut from_us = theirs.try_clone()?;
        let mut to_us = theirs;
        std::thread::spawn(move || {
            // Whatever ends it, the monitor sees the end of its input.
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut to_us);
            let _ = to_us.shutdown(std::net::Shutdown::Write);
        });
        let writer = std::thread::spawn(move || {
            let mut bytes = [0; 16 << 10];
            while let Ok(read @ 1..) = from_us.read(&mut bytes) {
                let mut output = std::io::stdout().lock();
                if output.write_all(&bytes[..read]).and_then(|()| output.flush()).is_err() {
                    break;
                }
            }
        });
        self.writer.replace(Some(writer));
        Ok(Connection::unix(UnixStream::from_std(ours)?))
    }

    /// Waits until what was sent has left. The connections are closed already.
    pub(super) fn finish(&self) {
        if let Some(writer) = self.writer.take() {
            // It can only have panicked, which it has told of.
            let _ = writer.join();
        }
    }

    async fn accept(&self) -> Option<Connection> {
        loop {
            let accepted = match &self.kind {
                Kind::UnixServer(listener, _) => {
                    listener.accept().await.map(|(stream, _)| Connection::unix(stream))
                }
                Kind::TcpServer(listener) => {
                    listener.accept().await.map(|(stream, _)| Connection::tcp(stream))
                }
                _ => return None,
            };
            match accepted {
                Ok(connection) => return Some(connection),
                Err(err) => {
                    tracing::warn!("chardev {}: cannot accept a connection: {err}", self.id);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// What `query-chardev` tells of it.
    pub(super) fn filename(&self) -> String {
        match &self.kind {
            Kind::UnixServer(_, path) => format!("unix:{},server=on", path.display()),
            Kind::TcpServer(listener) => {
                let address = listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
                format!("tcp:{address},server=on")
            }
            Kind::Client { address, .. } => shown(address),
            Kind::Stdio => "stdio".to_owned(),
            Kind::Null => "null".to_owned(),
        }
    }
}

fn shown(address: &Address) -> String {
    match address {
        Address::Unix(path) => format!("unix:{}", path.display()),
        Address::Tcp(host, port) => format!("tcp:{host}:{port}"),
    }
}

async fn connect(address: &Address) -> std::io::Result<Connection> {
    match address {
        Address::Unix(path) => UnixStream::connect(path).await.map(Connection::unix),
        Address::Tcp(host, port) => TcpStream::connect((host.as_str(), *port)).await.map(Connection::tcp),
    }
}

async fn socket(data: &Options) -> Result<Kind, Refusal> {
    let empty = Options::new();
    if data.contains_key("tls-creds")
        || data.flag("telnet") == Some(true)
        || data.flag("websocket") == Some(true)
    {
        return Err(generic("chardev: sockets with TLS, telnet or websocket are not supported"));
    }
    let addr = data.object("addr").unwrap_or(&empty);
    let place = addr.object("data").unwrap_or(&empty);
    let text = |key: &str| place.text(key).unwrap_or_default();
    let address = match addr.text("type").unwrap_or_default() {
        "unix" if place.flag("abstract") == Some(true) => {
            return Err(generic("chardev: abstract sockets are not supported"));
        }
        "unix" => Address::Unix(PathBuf::from(text("path"))),
        "inet" => Address::Tcp(text("host").to_owned(), port(text("port"))?),
        "fd" => return Err(generic(format!("Unable to parse FD number {}", text("str")))),
        other => return Err(generic(format!("chardev: sockets of type '{other}' are not supported"))),
    };
    let server = data.flag("server").unwrap_or(false);
    let milliseconds =
        data.number("reconnect-ms").or_else(|| data.number("reconnect").map(|s| s.saturating_mul(1000)));
    if server && milliseconds.is_some_and(|ms| ms > 0) {
        return Err(generic("'reconnect' option is incompatible with socket in server listen mode"));
    }
    if !server && data.contains_key("wait") {
        return Err(generic("'wait' option is incompatible with socket in client connect mode"));
    }
    if !server {
        let reconnect = milliseconds.filter(|ms| *ms > 0).map(Duration::from_millis);
        return Ok(Kind::Client { address, reconnect });
    }
    match address {
        Address::Unix(path) => listen_unix(&path).map(|listener| Kind::UnixServer(listener, path)),
        Address::Tcp(host, port) => {
            let host = if host.is_empty() { "0.0.0.0".to_owned() } else { host };
            let listener = TcpListener::bind((host.as_str(), port)).await;
            listener
                .map(Kind::TcpServer)
                .map_err(|err| generic(format!("Failed to listen on {host}:{port}: {err}")))
        }
    }
}

/// Listens at `path`; a socket that nobody listens to any more is replaced, as scripts are used to.
fn listen_unix(path: &Path) -> Result<UnixListener, Refusal> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        // If it can't be removed, binding says why.
        let _ = std::fs::remove_file(path);
    }
    UnixListener::bind(path)
        .map_err(|err| generic(format!("Failed to bind socket to {}: {}", path.display(), errno(&err))))
}

fn errno(err: &std::io::Error) -> String {
    err.raw_os_error().map_or_else(|| err.to_string(), super::failure::errno_text)
}
