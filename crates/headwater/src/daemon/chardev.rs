//! Character devices: where monitors are reached. Sockets that listen or connect, and standard input and output.

use super::failure::{Refusal, generic};
use super::sources::port;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Options of `--chardev`, each a key and its value.
pub(super) type ChardevOptions = Vec<(String, String)>;

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
    Client { address: Address, reconnect: Option<Duration> },
    Stdio,
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
    /// Makes a device from the options of `--chardev`: `socket,id=c,path=/run/qmp,server=on,wait=off`. Waits for a client where that was asked for.
    ///
    /// # Errors
    /// Options that don't fit together, and what the system says.
    pub(super) async fn open(options: &ChardevOptions) -> Result<Rc<Self>, Refusal> {
        let given: HashMap<&str, &str> = options.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let id = given.get("id").copied().ok_or_else(|| generic("chardev: no id specified"))?.to_owned();
        let kind = match given.get("backend").copied() {
            Some("stdio") => Kind::Stdio,
            Some("socket") => socket(&given, &id).await?,
            Some(other) => {
                return Err(generic(format!("chardev: '{other}' is not a valid char driver here; use socket or stdio")));
            }
            None => return Err(generic(format!("chardev: \"{id}\" missing backend"))),
        };
        let device = Self { id, kind, first: RefCell::default(), used_up: Cell::new(false), writer: RefCell::default() };
        let wait = switch(&given, "wait")?;
        match &device.kind {
            Kind::UnixServer(..) | Kind::TcpServer(_) if wait.unwrap_or(true) => {
                tracing::info!("waiting for a connection to chardev {}", device.id);
                let connection = device.accept().await;
                device.first.replace(connection);
            }
            Kind::Client { address, reconnect: None } => {
                let connection = connect(address).await.map_err(|err| {
                    generic(format!("Failed to connect to {}: {err}", shown(address)))
                })?;
                device.first.replace(Some(connection));
            }
            _ => {}
        }
        Ok(Rc::new(device))
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
            Kind::Client { .. } => None,
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
                Kind::UnixServer(listener, _) => listener.accept().await.map(|(stream, _)| Connection::unix(stream)),
                Kind::TcpServer(listener) => listener.accept().await.map(|(stream, _)| Connection::tcp(stream)),
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

fn switch(given: &HashMap<&str, &str>, key: &str) -> Result<Option<bool>, Refusal> {
    match given.get(key).copied() {
        None => Ok(None),
        Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
        Some("off" | "no" | "false" | "n") => Ok(Some(false)),
        Some(_) => Err(generic(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

async fn socket(given: &HashMap<&str, &str>, id: &str) -> Result<Kind, Refusal> {
    const KNOWN: [&str; 18] = [
        "backend", "id", "path", "host", "port", "server", "wait", "reconnect", "reconnect-ms", "nodelay", "ipv4",
        "ipv6", "to", "abstract", "tight", "delay", "logfile", "mux",
    ];
    if let Some(unknown) = given.keys().find(|key| !KNOWN.contains(key)) {
        return Err(generic(format!("Invalid parameter '{unknown}'")));
    }
    let server = switch(given, "server")?.unwrap_or(false);
    let number = |key: &str| given.get(key).map(|text| text.parse::<u64>()).transpose();
    let wrong = |_| generic("Parameter 'reconnect' expects a number");
    let milliseconds = match (number("reconnect").map_err(wrong)?, number("reconnect-ms").map_err(wrong)?) {
        (Some(seconds), _) => seconds.saturating_mul(1000),
        (None, Some(milliseconds)) => milliseconds,
        (None, None) => 0,
    };
    if server && milliseconds > 0 {
        return Err(generic("'reconnect' option is incompatible with socket in server listen mode"));
    }
    if !server && given.contains_key("wait") {
        return Err(generic("'wait' option is incompatible with socket in client connect mode"));
    }
    let address = match (given.get("path"), given.get("host"), given.get("port")) {
        (Some(path), None, _) => Address::Unix(PathBuf::from(path)),
        (None, host, Some(number)) => Address::Tcp(host.unwrap_or(&"").to_string(), port(number)?),
        (None, ..) => return Err(generic(format!("chardev: socket: no path or port given for '{id}'"))),
        (Some(_), Some(_), _) => return Err(generic("chardev: socket: 'path' and 'host' cannot both be given")),
    };
    if !server {
        let reconnect = (milliseconds > 0).then(|| Duration::from_millis(milliseconds));
        return Ok(Kind::Client { address, reconnect });
    }
    match address {
        Address::Unix(path) => listen_unix(&path).map(|listener| Kind::UnixServer(listener, path)),
        Address::Tcp(host, port) => {
            let host = if host.is_empty() { "0.0.0.0".to_owned() } else { host };
            let listener = TcpListener::bind((host.as_str(), port)).await;
            listener.map(Kind::TcpServer).map_err(|err| generic(format!("Failed to listen on {host}:{port}: {err}")))
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
