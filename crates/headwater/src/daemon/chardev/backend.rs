//! What is behind a character device: a socket that listens or connects, or standard input and output.

use crate::daemon::failure::{Refusal, errno_text, generic};
use crate::daemon::graph::open::{Options, Read as _};
use crate::daemon::sources::port;
use headwater_qmp::opts;
use std::cell::{Cell, RefCell};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Somebody at the other end.
pub(in crate::daemon) enum Peer {
    Unix(UnixStream),
    Tcp(TcpStream),
    /// Whoever has standard input and output.
    Stdio,
}

impl Peer {
    fn tcp(stream: TcpStream) -> Self {
        // Answers are small and somebody waits for them.
        let _ = stream.set_nodelay(true);
        Self::Tcp(stream)
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

/// A socket, or standard input and output.
pub(in crate::daemon) struct Backend {
    id: String,
    kind: Kind,
    /// The connection that was made at the start: a client's, or the one that a server waited for.
    first: RefCell<Option<Peer>>,
    used_up: Cell<bool>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Kind::UnixServer(_, path) = &self.kind {
            // If it is gone already, so much the better.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Backend {
    /// Makes what `--chardev` asks for: `socket,id=c,path=/run/qmp,server=on,wait=off`. Waits for a client where that was asked for.
    ///
    /// # Errors
    /// Options that don't fit together, and what the system says.
    pub(in crate::daemon) async fn open(asked: &opts::Chardev) -> Result<Self, Refusal> {
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
        let backend =
            Self { id: asked.id.clone(), kind, first: RefCell::default(), used_up: Cell::new(false) };
        match &backend.kind {
            Kind::UnixServer(..) | Kind::TcpServer(_) if data.flag("wait").unwrap_or(true) => {
                tracing::info!("waiting for a connection to chardev {}", backend.id);
                let peer = backend.accept().await;
                backend.first.replace(peer);
            }
            Kind::Client { address, reconnect: None } => {
                let peer = connect(address).await.map_err(|err| {
                    let name = shown(address);
                    generic(format!(
                        "Failed to connect to '{}': {}",
                        name.trim_start_matches("unix:"),
                        errno(&err)
                    ))
                })?;
                backend.first.replace(Some(peer));
            }
            _ => {}
        }
        Ok(backend)
    }

    /// The next peer; none if there can be no more.
    pub(in crate::daemon) async fn peer(&self) -> Option<Peer> {
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
                if let Ok(peer) = connect(address).await {
                    return Some(peer);
                }
            },
            Kind::Client { .. } | Kind::Null => None,
            Kind::Stdio if self.used_up.replace(true) => None,
            Kind::Stdio => Some(Peer::Stdio),
        }
    }

    async fn accept(&self) -> Option<Peer> {
        loop {
            let accepted = match &self.kind {
                Kind::UnixServer(listener, _) => {
                    listener.accept().await.map(|(stream, _)| Peer::Unix(stream))
                }
                Kind::TcpServer(listener) => listener.accept().await.map(|(stream, _)| Peer::tcp(stream)),
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
    pub(in crate::daemon) fn filename(&self) -> String {
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

    /// The TCP port at which it listens, or to which it connects.
    pub(in crate::daemon) fn port(&self) -> Option<u16> {
        match &self.kind {
            Kind::TcpServer(listener) => Some(listener.local_addr().ok()?.port()),
            Kind::Client { address: Address::Tcp(_, port), .. } => Some(*port),
            _ => None,
        }
    }
}

fn shown(address: &Address) -> String {
    match address {
        Address::Unix(path) => format!("unix:{}", path.display()),
        Address::Tcp(host, port) => format!("tcp:{host}:{port}"),
    }
}

async fn connect(address: &Address) -> std::io::Result<Peer> {
    match address {
        Address::Unix(path) => UnixStream::connect(path).await.map(Peer::Unix),
        Address::Tcp(host, port) => TcpStream::connect((host.as_str(), *port)).await.map(Peer::tcp),
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
    err.raw_os_error().map_or_else(|| err.to_string(), errno_text)
}
