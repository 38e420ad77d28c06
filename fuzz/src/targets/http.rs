//! A source behind HTTP whose server says what it likes.
//!
//! Input: a byte with the number of reads, six bytes for each of these (where and how much), then what the server answers to one request after the other: a length of
//! two bytes, a head of so many bytes, the length of the body (2 bytes). When the input ends, the server closes.
//!
//! Asserted: opening and reading end; a read that succeeds gives what the server has at that place, however strange its answers are, as long as
//! it sends the range that was asked for where it says so, and the whole file from its start otherwise.

use super::runtime;
use crate::Target;
use arbitrary::{Result, Unstructured};
use headwater_block::{BufferMut, Node};
use headwater_storage::http::{HttpNode, HttpOptions};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// See the module.
pub const TARGET: Target = Target { name: "http", run, seeds, max_len: 4096 };

/// How long everything may take.
const SOON: Duration = Duration::from_secs(4);

/// How long the server waits for a client that waits for it.
const IDLE: Duration = Duration::from_millis(5);

/// The most reads.
const MAX_READS: u8 = 4;

fn run(data: &[u8]) {
    // The input ends where it ends.
    let _ = attempt(&mut Unstructured::new(data));
}

/// What the server has at an offset: nothing that could be taken for a part of a protocol.
fn byte_at(offset: u64) -> u8 {
    (offset / 5 + offset / 4096) as u8 | 0x80
}

/// An answer: its head, and the length of its body.
type Answer = (Vec<u8>, u16);

struct Server {
    answers: RefCell<VecDeque<Answer>>,
    /// A head had a body of its own: what was read may be that.
    odd: Cell<bool>,
}

fn attempt(input: &mut Unstructured<'_>) -> Result<()> {
    let mut reads: Vec<(u32, u16)> = Vec::new();
    for _ in 0..=input.arbitrary::<u8>()? % MAX_READS {
        reads.push(input.arbitrary()?);
    }
    let mut answers = VecDeque::new();
    while !input.is_empty() {
        let len = usize::from(input.arbitrary::<u16>()?).min(input.len());
        let head = input.bytes(len)?.to_vec();
        answers.push_back((head, input.arbitrary()?));
    }
    runtime::run(async move {
        let server = Rc::new(Server { answers: RefCell::new(answers), odd: Cell::new(false) });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/disk.img", listener.local_addr().expect("an address"));
        let accepting = tokio::task::spawn_local(accept(listener, server.clone()));
        let done = timeout(SOON, use_it(&url, reads, &server)).await;
        assert!(done.is_ok(), "a read hangs although the server has closed");
        accepting.abort();
    });
    Ok(())
}

async fn use_it(url: &str, reads: Vec<(u32, u16)>, server: &Server) {
    let second = Duration::from_secs(1);
    let options = HttpOptions {
        connections: 2,
        connect_timeout: second,
        request_timeout: second / 4,
        retry: Duration::ZERO,
        open_retry: Duration::ZERO,
        read_ahead: 4096,
    };
    let node = match HttpNode::open(url, options).await {
        Ok(node) => node,
        Err(error) => return assert!(error.to_string().contains("127.0.0.1"), "{error} names no address"),
    };
    for (place, len) in reads {
        let offset = if node.size() == 0 { 0 } else { u64::from(place) % node.size() };
        let Ok(bytes) = node.read(offset, BufferMut::new(usize::from(len) + 1)).await else { continue };
        for (at, byte) in (offset..).zip(bytes.iter()) {
            let here = if at < node.size() { byte_at(at) } else { 0 };
            assert!(*byte == here || server.odd.get(), "{byte} at {at}, where the server has {here}");
        }
    }
    let _ = node.close().await;
}

async fn accept(listener: TcpListener, server: Rc<Server>) {
    while let Ok((stream, _)) = listener.accept().await {
        let server = server.clone();
        tokio::task::spawn_local(async move {
            let _ = serve(stream, &server).await;
        });
    }
}

async fn serve(mut stream: TcpStream, server: &Server) -> std::io::Result<()> {
    let mut received = Vec::new();
    loop {
        let end = received.windows(4).position(|window| window == b"\r\n\r\n");
        let Some(end) = end else {
            match timeout(IDLE, stream.read_buf(&mut received)).await {
                Ok(Ok(more)) if more > 0 => continue,
                _ => return Ok(()),
            }
        };
        let request = String::from_utf8_lossy(&received[..end]).to_ascii_lowercase();
        received.drain(..end + 4);
        let Some((mut head, len)) = server.answers.borrow_mut().pop_front() else { return Ok(()) };
        let from = if head.get(9..12) == Some(b"206") { asked_from(&request) } else { 0 };
        let ends = head.windows(4).position(|window| window == b"\r\n\r\n");
        match ends {
            Some(end) if end + 4 == head.len() => {}
            None => head.extend_from_slice(b"\r\n\r\n"),
            Some(_) => server.odd.set(true),
        }
        // Lines may also end without the first half of their end.
        let plain = head.windows(2).any(|window| window == b"\n\n")
            || head.windows(3).any(|window| window == b"\n\r\n" && !head.ends_with(b"\r\n\r\n"));
        if plain || String::from_utf8_lossy(&head).to_ascii_lowercase().contains("transfer-encoding") {
            server.odd.set(true);
        }
        head.extend((0..u64::from(len)).map(|at| byte_at(from.wrapping_add(at))));
        stream.write_all(&head).await?;
    }
}

/// Where the range starts that was asked for.
fn asked_from(request: &str) -> u64 {
    let range = request.split("range: bytes=").nth(1).unwrap_or_default();
    range.split('-').next().and_then(|from| from.parse().ok()).unwrap_or(0)
}

fn seeds() -> Vec<Vec<u8>> {
    let answer = |head: &str, len: u16| {
        let head = format!("HTTP/1.1 {}\r\n\r\n", head.replace('\n', "\r\n"));
        [&(head.len() as u16).to_le_bytes()[..], head.as_bytes(), &len.to_le_bytes()].concat()
    };
    let reads = [
        &[1][..],
        &9000_u32.to_le_bytes(),
        &700_u16.to_le_bytes(),
        &70_000_u32.to_le_bytes(),
        &40_000_u16.to_le_bytes(),
    ]
    .concat();
    let part = |from: u64, len: u16, more: &str| {
        let to = from + u64::from(len) - 1;
        answer(
            &format!(
                "206 Partial Content\nContent-Range: bytes {from}-{to}/200000\nContent-Length: {len}{more}"
            ),
            len,
        )
    };
    let tag = "\nETag: \"a\"";
    let date = "\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT";
    let first = |more: &str| part(0, 4096, more);
    let more: Vec<u8> = [part(8192, 4096, tag), part(69632, 41072, tag)].concat();
    vec![
        [reads.clone(), first(tag), more.clone()].concat(),
        [reads.clone(), first(date), part(8192, 4096, date)].concat(),
        [reads.clone(), first(tag), part(8192, 4096, "\nETag: \"b\"")].concat(),
        [reads.clone(), first(tag), answer("412 Precondition Failed\nContent-Length: 0", 0)].concat(),
        [reads.clone(), answer("200 OK\nContent-Length: 5000\nAccept-Ranges: bytes", 5000), more].concat(),
        [reads.clone(), answer("416 Range Not Satisfiable\nContent-Range: bytes */0\nContent-Length: 0", 0)].concat(),
        [reads.clone(), answer("302 Found\nLocation: /other?x\nContent-Length: 0", 0), first("")].concat(),
        [reads.clone(), answer("503 Service Unavailable\nRetry-After: 0\nConnection: close", 0), first("")].concat(),
        [reads.clone(), answer("404 Not Found\nContent-Length: 4", 4)].concat(),
        [reads, answer("206 Partial Content\nContent-Range: bytes 0-9/99999999999999999999\nTransfer-Encoding: chunked", 9)].concat(),
    ]
}
