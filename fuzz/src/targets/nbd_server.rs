//! An NBD server whose client says what it likes.
//!
//! Input: a byte that chooses the disk and how the client's negotiation goes (as an honest one's, or as the bytes say), then what the client
//! sends.
//!
//! Asserted: when the client has closed its side, the server answers what it understood and closes, without any timer; what it sends is a
//! greeting, and after an honest negotiation well-formed replies to requests that were made, at most one for each; the server then serves the next client, and
//! stops; what the disk holds beyond the client's writes is untouched.

use super::nbd_codec::eager_client;
use super::runtime;
use crate::Target;
use headwater_block::memory::MemoryNode;
use headwater_block::{Disk, DiskOptions, Edge, Node, TokioClock};
use headwater_export::Listen;
use headwater_export::nbd::{Export, NbdServer, ServerOptions};
use headwater_nbd::{ChunkKind, Command, Headers, ReplyHeader, Request, TransmissionFlags};
use std::collections::HashMap;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream as Socket};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// See the module.
pub const TARGET: Target = Target { name: "nbd_server", run, seeds, max_len: 2048 };

/// How long everything may take. Nothing waits for anything but a client that has closed its side.
const SOON: Duration = Duration::from_secs(4);

/// The disk's size in bytes.
const SIZE: u64 = 64 << 10;

fn run(data: &[u8]) {
    let Some((how, said)) = data.split_first() else { return };
    let said =
        if how & 1 == 0 { [eager_client(headers(*how)), said.to_vec()].concat() } else { said.to_vec() };
    runtime::run(async move {
        let done = timeout(SOON, serve(*how, said)).await;
        assert!(done.is_ok(), "the server hangs although its client has closed");
    });
}

fn headers(how: u8) -> Headers {
    if how & 32 == 0 { Headers::Structured } else { Headers::Extended }
}

async fn serve(how: u8, said: Vec<u8>) {
    let memory = MemoryNode::new("disk", (0..SIZE).map(|at| (at / 512) as u8).collect());
    let disk = Disk::new(memory.clone(), Rc::new(TokioClock::default()), DiskOptions::default());
    let name = format!("headwater-fuzz-{}", std::process::id()).into_bytes();
    let server = NbdServer::start(
        Listen::Abstract { name: name.clone(), tight: true },
        ServerOptions { empty_name_is_only_export: how & 4 != 0, ..ServerOptions::default() },
    )
    .expect("nobody else has this name");
    let export = Export {
        name: "disk".to_owned(),
        description: "what is served".to_owned(),
        edge: Edge::new(disk),
        writable: how & 2 == 0,
        writethrough: how & 16 != 0,
        allocation_depth: how & 8 != 0,
    };
    server.add(export).expect("there is none of this name");
    let answers = talk(&name, &said).await;
    assert!(answers.starts_with(b"NBDMAGICIHAVEOPT"));
    if how & 1 == 0 {
        let client = eager_client(headers(how));
        let honest = talk(&name, &client).await;
        assert!(answers.starts_with(&honest), "an honest negotiation went otherwise");
        check_replies(headers(how), &said[client.len()..], &answers[honest.len()..]);
    } else {
        talk(&name, &eager_client(Headers::Structured)).await;
    }
    if how & 2 != 0 {
        let bytes = memory.contents();
        assert!(
            bytes.iter().enumerate().all(|(at, byte)| *byte == (at / 512) as u8),
            "a read-only disk changed"
        );
    }
    assert_eq!(memory.size(), SIZE);
    server.stop().await;
}

/// What the server answers to a client that says this and nothing more.
async fn talk(name: &[u8], said: &[u8]) -> Vec<u8> {
    let address = SocketAddr::from_abstract_name(name).expect("a short name");
    let socket = Socket::connect_addr(&address).expect("the server listens");
    socket.set_nonblocking(true).expect("a socket");
    let mut stream = UnixStream::from_std(socket).expect("a socket");
    let (mut reader, mut writer) = stream.split();
    let mut answers = Vec::new();
    let (_, read) = tokio::join!(
        async {
            // A server that has heard enough closes.
            let _ = writer.write_all(said).await;
            let _ = writer.shutdown().await;
        },
        reader.read_to_end(&mut answers),
    );
    // What it had to say before it cut its client off may be lost with that.
    drop(read);
    answers
}

/// Asserts that `answers` are replies to the requests in `said`.
fn check_replies(headers: Headers, mut said: &[u8], mut answers: &[u8]) {
    // What matters here is how long a payload may be.
    let terms = headwater_nbd::Terms {
        size: SIZE,
        flags: TransmissionFlags::HAS_FLAGS,
        minimum_block: 1,
        maximum_payload: 32 << 20,
        headers,
        contexts: true,
    };
    let mut asked: HashMap<u64, Vec<Request>> = HashMap::new();
    while let Ok(Some(request)) = Request::decode(said, headers) {
        let Ok(payload) = request.payload_len(&terms) else { break };
        let len = Request::len_of(headers) + payload as usize;
        asked.entry(request.cookie).or_default().push(request);
        said = said.get(len..).unwrap_or_default();
    }
    while let Ok(Some((header, len))) = ReplyHeader::decode(answers, headers, 32 << 20) {
        answers = &answers[len..];
        let cookie = header.cookie();
        let requests = asked.get_mut(&cookie).filter(|requests| !requests.is_empty());
        let requests = requests.unwrap_or_else(|| panic!("a reply to {cookie}, which nobody asked"));
        let (payload, over) = match header {
            ReplyHeader::Simple { .. } => {
                assert!(!headers.are_extended());
                (0, true)
            }
            ReplyHeader::Chunk(chunk) => {
                if matches!(chunk.kind, ChunkKind::OffsetData | ChunkKind::OffsetHole) {
                    assert!(requests.iter().any(|request| request.command == Command::Read));
                }
                (chunk.length as usize, chunk.done)
            }
        };
        // The last of them may be cut short with the connection.
        answers = answers.get(payload..).unwrap_or_default();
        if over {
            requests.pop();
        }
    }
    assert!(answers.len() < ReplyHeader::EXTENDED_LEN, "{} bytes that are no reply", answers.len());
}

fn seeds() -> Vec<Vec<u8>> {
    let mixes = [Headers::Structured, Headers::Extended].map(mix);
    let request = |command, cookie, offset, length| {
        Request::new(command, cookie, offset, length).encode(Headers::Structured).to_vec()
    };
    let [mix, extended] = mixes;
    vec![
        [vec![32], extended.clone()].concat(),
        [vec![32 | 2 | 8], extended].concat(),
        [vec![0], mix.clone()].concat(),
        [vec![2 | 8], mix.clone()].concat(),
        [vec![0], request(Command::Read, 1, 0, u32::MAX.into())].concat(),
        [vec![0], request(Command::Write, 1, 0, 1 << 20), vec![3; 50]].concat(),
        [vec![0], vec![0x25, 0x60, 0x95, 0x13, 0xff, 0xff, 0, 99], vec![0; 20]].concat(),
        [vec![1 | 4], eager_client(Headers::Structured), mix].concat(),
        [vec![1], vec![0, 0, 0, 3], b"IHAVEOPT\0\0\0\x02\0\0\0\0".to_vec()].concat(),
        b"\x01GET / HTTP/1.1\r\n\r\n".to_vec(),
    ]
}

/// Requests of all kinds, right and wrong.
fn mix(headers: Headers) -> Vec<u8> {
    let request = |command, cookie, offset, length| {
        Request::new(command, cookie, offset, length).encode(headers).to_vec()
    };
    let write = |cookie, offset, data: &[u8]| {
        [request(Command::Write, cookie, offset, data.len() as u64), data.to_vec()].concat()
    };
    [
        request(Command::Read, 1, 0, 4096),
        write(2, 512, &[9; 100]),
        request(Command::WriteZeroes, 3, 1024, 2048),
        request(Command::Trim, 4, 4096, 4096),
        request(Command::BlockStatus, 5, 0, SIZE),
        request(Command::Flush, 6, 0, 0),
        request(Command::Read, 7, SIZE - 1, 2),
        request(Command::Cache, 8, 0, 512),
        request(Command::Disconnect, 9, 0, 0),
    ]
    .concat()
}
