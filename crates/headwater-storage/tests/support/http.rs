//! An HTTP server whose answers a test decides.

use super::pattern;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

/// A request, as received.
pub(crate) struct Asked {
    /// How many requests came before it.
    pub(crate) number: usize,
    pub(crate) path: String,
    pub(crate) headers: HashMap<String, String>,
    /// The range, its end exclusive.
    pub(crate) range: Option<Range<u64>>,
}

/// What to do with a request.
pub(crate) enum Answer {
    /// These bytes; the connection stays.
    Send(Vec<u8>),
    /// These bytes, then the end of the connection.
    SendAndClose(Vec<u8>),
    /// These bytes, then silence.
    SendAndStall(Vec<u8>),
    /// These bytes, 40 at a time, fifty times a second.
    Trickle(Vec<u8>),
}

/// What `FILE` is good for: the proper answer to a range request for a file of `size` bytes that holds the pattern.
pub(crate) fn proper(asked: &Asked, size: u64, headers: &str) -> Vec<u8> {
    let range = asked.range.clone().unwrap_or(0..size);
    let end = range.end.min(size);
    if range.start >= size {
        return format!("HTTP/1.1 416 Nope\r\nContent-Range: bytes */{size}\r\nContent-Length: 0\r\n\r\n")
            .into_bytes();
    }
    let len = end - range.start;
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {}-{}/{size}\r\nContent-Length: {len}\r\n{headers}\r\n",
        range.start,
        end - 1
    );
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(&pattern(range.start, len as usize));
    bytes
}

/// A running server. Ends with its `LocalSet`.
pub(crate) struct HttpServer {
    pub(crate) port: u16,
    /// How many requests came.
    pub(crate) requests: Rc<Cell<usize>>,
    /// How many connections were made.
    pub(crate) connections: Rc<Cell<usize>>,
    /// How many requests are being answered, at most so far.
    pub(crate) most_at_once: Rc<Cell<usize>>,
    /// How long to wait before each answer.
    pub(crate) delay: Rc<Cell<Duration>>,
    /// What was asked for.
    pub(crate) ranges: Rc<RefCell<Vec<Range<u64>>>>,
}

type Handler = dyn Fn(&Asked) -> Answer;

#[derive(Clone)]
struct Shared {
    handler: Rc<Handler>,
    requests: Rc<Cell<usize>>,
    active: Rc<Cell<usize>>,
    most_at_once: Rc<Cell<usize>>,
    delay: Rc<Cell<Duration>>,
    ranges: Rc<RefCell<Vec<Range<u64>>>>,
}

impl HttpServer {
    pub(crate) async fn start(handler: impl Fn(&Asked) -> Answer + 'static) -> Self {
        Self::start_with(handler, None).await
    }

    pub(crate) async fn start_with(
        handler: impl Fn(&Asked) -> Answer + 'static,
        tls: Option<tokio_rustls::TlsAcceptor>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Shared {
            handler: Rc::new(handler),
            requests: Rc::default(),
            active: Rc::default(),
            most_at_once: Rc::default(),
            delay: Rc::default(),
            ranges: Rc::default(),
        };
        let connections = Rc::new(Cell::new(0));
        let server = Self {
            port,
            requests: shared.requests.clone(),
            connections: connections.clone(),
            most_at_once: shared.most_at_once.clone(),
            delay: shared.delay.clone(),
            ranges: shared.ranges.clone(),
        };
        tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                connections.set(connections.get() + 1);
                let (shared, tls) = (shared.clone(), tls.clone());
                tokio::task::spawn_local(async move {
                    // A client that goes is no matter.
                    let _ = match tls {
                        None => serve(stream, shared).await,
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => serve(stream, shared).await,
                            Err(e) => Err(e),
                        },
                    };
                });
            }
        });
        server
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(stream: S, shared: Shared) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            if line.trim_end().is_empty() {
                break;
            }
            lines.push(line.trim_end().to_owned());
        }
        let path = lines[0].split(' ').nth(1).unwrap().to_owned();
        let headers: HashMap<_, _> = lines[1..]
            .iter()
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let range = headers.get("range").map(|range| {
            let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
            first.parse::<u64>().unwrap()..last.parse::<u64>().unwrap() + 1
        });
        let number = shared.requests.get();
        shared.requests.set(number + 1);
        shared.ranges.borrow_mut().extend(range.clone());
        shared.active.set(shared.active.get() + 1);
        shared.most_at_once.set(shared.most_at_once.get().max(shared.active.get()));
        tokio::time::sleep(shared.delay.get()).await;
        let answer = (shared.handler)(&Asked { number, path, headers, range });
        shared.active.set(shared.active.get() - 1);
        match answer {
            Answer::Send(bytes) => stream.write_all(&bytes).await?,
            Answer::SendAndClose(bytes) => {
                stream.write_all(&bytes).await?;
                return stream.shutdown().await;
            }
            Answer::Trickle(bytes) => {
                for some in bytes.chunks(40) {
                    stream.write_all(some).await?;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            Answer::SendAndStall(bytes) => {
                stream.write_all(&bytes).await?;
                stream.flush().await?;
                std::future::pending::<()>().await;
            }
        }
        stream.flush().await?;
    }
}
