//! An HTTP server that serves one file's bytes, rightly or wrongly.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// What is wrong with a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing.
    None,
    /// It answers a Range request with 200 and the whole file.
    IgnoresRanges,
    /// Once `turned`, its ETag is another one.
    ChangesEtag,
    /// Once `turned`, the file has another size.
    ChangesSize,
    /// Once `turned`, it sends half of what it announced and closes.
    CutsShort,
    /// It answers with a page that says "not found".
    NotFound,
}

/// A running server; it ends with the test.
pub(crate) struct HttpServer {
    pub(crate) url: String,
    turned: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    asked: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
}

impl HttpServer {
    /// Serves `content` as `/image`, each answer `delay` late.
    pub(crate) fn start(content: Vec<u8>, fault: Fault, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let url = format!("http://{}/image", listener.local_addr().expect("address"));
        let turned = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU64::new(0));
        let (asked, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let shared = Arc::new(Shared {
            content,
            fault,
            delay,
            turned: turned.clone(),
            sent: sent.clone(),
            asked: asked.clone(),
            answered: answered.clone(),
        });
        std::thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                let shared = shared.clone();
                std::thread::spawn(move || while shared.answer(&socket).is_some() {});
            }
        });
        Self { url, turned, sent, asked, answered }
    }

    /// How many requests have come, and how many it has begun to answer.
    pub(crate) fn requests(&self) -> (u64, u64) {
        (self.asked.load(Ordering::SeqCst), self.answered.load(Ordering::SeqCst))
    }

    /// How many bytes of the file it has sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    /// From now on the fault shows.
    pub(crate) fn turn(&self) {
        self.turned.store(true, Ordering::SeqCst);
    }
}

struct Shared {
    content: Vec<u8>,
    fault: Fault,
    delay: Duration,
    turned: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    asked: Arc<AtomicU64>,
    answered: Arc<AtomicU64>,
}

impl Shared {
    /// Answers one request; `None` ends the connection.
    fn answer(&self, mut socket: &TcpStream) -> Option<()> {
        let mut reader = BufReader::with_capacity(1, socket);
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if line.trim().is_empty() {
                break;
            }
            head.push(line.trim().to_owned());
        }
        self.asked.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.delay);
        self.answered.fetch_add(1, Ordering::SeqCst);
        let turned = self.turned.load(Ordering::SeqCst);
        let is_head = head.first()?.starts_with("HEAD");
        let range = head.iter().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            let (start, end) = value.trim().strip_prefix("bytes=")?.split_once('-')?;
            name.eq_ignore_ascii_case("range").then(|| (start.parse().ok(), end.parse().ok()))
        });
        let mut total = self.content.len();
        if turned && self.fault == Fault::ChangesSize {
            total += 4096;
        }
        if self.fault == Fault::NotFound {
            let page = "HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found";
            return socket.write_all(page.as_bytes()).ok();
        }
        let (status, start, end) = match range {
            Some((Some(start), end)) if self.fault != Fault::IgnoresRanges => {
                let end: usize = end.map_or(total, |last: usize| (last + 1).min(total));
                ("206 Partial Content", start, end)
            }
            _ => ("200 OK", 0, total),
        };
        let etag = if turned && self.fault == Fault::ChangesEtag { "two" } else { "one" };
        let mut answer =
            format!("HTTP/1.1 {status}\r\nETag: \"{etag}\"\r\nContent-Length: {}\r\n", end - start);
        answer += "Last-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n";
        if status.starts_with("206") {
            answer += &format!("Content-Range: bytes {start}-{}/{total}\r\n", end - 1);
        } else if self.fault != Fault::IgnoresRanges {
            answer += "Accept-Ranges: bytes\r\n";
        }
        answer += "\r\n";
        socket.write_all(answer.as_bytes()).ok()?;
        if is_head {
            return Some(());
        }
        let body = &self.content[start.min(self.content.len())..end.min(self.content.len())];
        if turned && self.fault == Fault::CutsShort {
            let _ = socket.write_all(&body[..body.len() / 2]);
            let _ = socket.shutdown(std::net::Shutdown::Both);
            return None;
        }
        self.sent.fetch_add(body.len() as u64, Ordering::SeqCst);
        socket.write_all(body).ok()
    }
}
