//! An NBD source whose server says what it likes.
//!
//! Input: a byte that chooses what the server says while it negotiates (what an honest one says, or what follows until the program
//! begins), a byte with the number of requests, five bytes for each of these (what, where, how much), then the server's part: for each request that arrives,
//! a number of chunks and what is in them, or bytes as they are.
//!
//! Asserted: every request ends, without any timer, once the server has closed; a read that succeeds gives, byte by byte, what the server said of
//! that place, or zeroes where it told of a hole.

use super::nbd_codec::agreeable_server;
use super::runtime;
use crate::Target;
use arbitrary::{Result, Unstructured};
use headwater_block::{Buffer, BufferMut, Node, WriteFlags, ZeroFlags};
use headwater_nbd::{Headers, ReplyTo, Request, reply};
use headwater_storage::nbd::{NbdNode, NbdOptions, Server};
use std::os::unix::net::UnixStream as Socket;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// See the module.
pub const TARGET: Target = Target { name: "nbd_client", run, seeds, max_len: 2048 };

/// How long everything may take. Nothing waits for anything but a server that has closed.
const SOON: Duration = Duration::from_secs(4);

/// How long the server waits for a client that waits for it.
const IDLE: Duration = Duration::from_millis(5);

/// The most requests.
const MAX_REQUESTS: u8 = 8;

fn run(data: &[u8]) {
    // The input ends where it ends.
    let _ = attempt(&mut Unstructured::new(data));
}

/// What is at an offset of the export, unless there is a hole.
fn byte_at(offset: u64) -> u8 {
    (offset / 7 + offset / 300) as u8 | 1
}

/// What a request does, where and with how much.
type Step = (u8, u16, u16);

fn attempt(input: &mut Unstructured<'_>) -> Result<()> {
    let (how, count): (u8, u8) = (input.arbitrary()?, input.arbitrary()?);
    let mut steps: Vec<Step> = Vec::new();
    for _ in 0..=count % MAX_REQUESTS {
        steps.push(input.arbitrary()?);
    }
    let greeting = if how & 1 == 0 {
        agreeable_server(if how & 2 == 0 { 1 << 16 } else { (1 << 16) - 77 }, headers(how))
    } else {
        let len = usize::from(input.arbitrary::<u16>()?).min(input.len());
        input.bytes(len)?.to_vec()
    };
    let script = input.bytes(input.len())?.to_vec();
    runtime::run(async move {
        let (ours, theirs) = Socket::pair().expect("a pair of sockets");
        let server = tokio::task::spawn_local(serve(theirs, greeting, script, headers(how)));
        let done = timeout(SOON, use_it(ours, steps, how & 4 != 0)).await;
        assert!(done.is_ok(), "a request hangs although the server has closed");
        server.abort();
    });
    Ok(())
}

fn headers(how: u8) -> Headers {
    if how & 8 == 0 { Headers::Structured } else { Headers::Extended }
}

async fn use_it(socket: Socket, steps: Vec<Step>, at_once: bool) {
    let options = NbdOptions { retry: Duration::ZERO, ..NbdOptions::default() };
    let Ok(node) = NbdNode::open(Server::Fd(socket.into()), "disk", options).await else { return };
    let requests = steps.into_iter().map(|step| request(&*node, step));
    if at_once {
        futures_util::future::join_all(requests).await;
    } else {
        for request in requests {
            request.await;
        }
    }
    let _ = node.close().await;
}

async fn request(node: &dyn Node, (what, place, len): Step) {
    let offset = u64::from(place);
    let len = u64::from(len % 8192) + 1;
    match what % 8 {
        0..4 => {
            let Ok(bytes) = node.read(offset, BufferMut::new(len as usize)).await else { return };
            for (at, byte) in (offset..).zip(bytes.iter()) {
                let here = if at < node.size() { byte_at(at) } else { 0 };
                assert!(*byte == 0 || *byte == here, "{byte} at {at}, where the server has {here}");
            }
        }
        4 => {
            let end = (offset + len).max(offset + 1);
            if let Ok(extent) = node.status(offset..end).await {
                assert!(extent.offset == offset && extent.len > 0 && extent.end() <= end, "{extent:?}");
            }
        }
        5 => {
            let data = Buffer::copy_of(&vec![7; 512 * (len as usize / 512 + 1)]);
            let _ = node
                .write(offset / 512 * 512, data, WriteFlags { fua: len % 2 == 0, ..WriteFlags::default() })
                .await;
        }
        6 => {
            let (offset, len) = (offset / 512 * 512, (len / 512 + 1) * 512);
            if len % 1024 == 0 {
                let _ = node.discard(offset, len).await;
            } else {
                let _ =
                    node.write_zeroes(offset, len, ZeroFlags { unmap: true, ..ZeroFlags::default() }).await;
            }
        }
        _ => {
            let _ = node.flush().await;
        }
    }
}

/// Says `greeting`, then answers requests as the script has it until that ends.
async fn serve(socket: Socket, greeting: Vec<u8>, script: Vec<u8>, headers: Headers) -> std::io::Result<()> {
    socket.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(socket)?;
    stream.write_all(&greeting).await?;
    let mut script = Unstructured::new(&script);
    let mut received = Vec::new();
    let magic: [u8; 4] =
        if headers.are_extended() { [0x21, 0xe4, 0x1c, 0x71] } else { [0x25, 0x60, 0x95, 0x13] };
    // The first request is the first thing that looks like one.
    while !script.is_empty() {
        let start = received.windows(4).position(|window| window == magic);
        let whole = start
            .and_then(|at| Request::decode(&received[at..], headers).ok().flatten().map(|asked| (at, asked)));
        let Some((at, asked)) = whole else {
            match timeout(IDLE, stream.read_buf(&mut received)).await {
                Ok(Ok(more)) if more > 0 => continue,
                _ => break,
            }
        };
        received.drain(..at + Request::len_of(headers));
        let answer = answer(&mut script, &asked, headers).unwrap_or_default();
        stream.write_all(&answer).await?;
    }
    Ok(())
}

/// What the script says to a request.
fn answer(script: &mut Unstructured<'_>, asked: &Request, headers: Headers) -> Result<Vec<u8>> {
    let mut answer = Vec::new();
    for _ in 0..=script.arbitrary::<u8>()? % 4 {
        let (kind, done): (u8, bool) = (script.arbitrary()?, script.arbitrary()?);
        // Mostly within what was asked for.
        let (from, len): (u16, u16) = (script.arbitrary()?, script.arbitrary()?);
        let offset =
            asked.offset.wrapping_add(u64::from(from)).wrapping_sub(if kind & 0x80 == 0 { 0 } else { 64 });
        let len = if len == 0 { asked.length as u32 } else { u32::from(len) };
        let cookie = if kind & 0x40 == 0 { asked.cookie } else { asked.cookie.wrapping_add(1) };
        let to = ReplyTo { headers, cookie, offset: asked.offset };
        match kind & 7 {
            0 | 1 => {
                answer.extend_from_slice(&reply::encode_data_prefix(to, offset, len, done));
                answer.extend((0..u64::from(len)).map(|at| byte_at(offset.wrapping_add(at))));
            }
            2 => answer.extend_from_slice(&reply::encode_hole(to, offset, len, done)),
            3 => answer.extend_from_slice(&reply::encode_done(to)),
            4 => {
                let extents = [
                    reply::StatusExtent { length: len.into(), flags: u32::from(kind >> 3) & 3 },
                    reply::StatusExtent { length: u64::from(from), flags: 0 },
                ];
                reply::encode_block_status(&mut answer, to, 1, &extents, done);
            }
            5 => reply::encode_error(
                &mut answer,
                to,
                headwater_nbd::ErrorCode::from_wire(from.into()).unwrap_or(headwater_nbd::ErrorCode::Io),
                "no",
            ),
            6 => {
                let error = headwater_nbd::ErrorCode::from_wire(from.into());
                answer.extend_from_slice(&reply::encode_simple(cookie, error));
            }
            _ => {
                let len = usize::from(from % 64).min(script.len());
                answer.extend_from_slice(script.bytes(len)?);
            }
        }
    }
    Ok(answer)
}

fn seeds() -> Vec<Vec<u8>> {
    let step =
        |what: u8, place: u16, len: u16| [&[what][..], &place.to_le_bytes(), &len.to_le_bytes()].concat();
    // A byte for the kind and one that says whether it is the last, where and how much.
    let chunk = |kind: u8, done: u8, from: u16, len: u16| {
        [&[kind, done][..], &from.to_le_bytes(), &len.to_le_bytes()].concat()
    };
    let reads = [step(0, 4096, 1023), step(0, 100, 5000)].concat();
    let whole = [vec![0], chunk(0, 1, 0, 0)].concat();
    let parts =
        [vec![3], chunk(0, 0, 0, 512), chunk(2, 0, 512, 256), chunk(0, 0, 768, 256), chunk(3, 1, 0, 0)]
            .concat();
    let many = [step(4, 0, 4096), step(5, 0, 600), step(6, 512, 511), step(7, 0, 0)].concat();
    let fine = [vec![0], chunk(3, 1, 0, 0)].concat();
    let greeting = agreeable_server(1 << 20, Headers::Structured);
    vec![
        [vec![0, 1], reads.clone(), whole.clone(), whole.clone()].concat(),
        [vec![8, 1], reads.clone(), whole.clone(), whole.clone()].concat(),
        [vec![8 | 6, 1], reads.clone(), parts.clone(), whole.clone()].concat(),
        [vec![6, 1], reads.clone(), parts.clone(), whole.clone()].concat(),
        [vec![0, 3], many, vec![0], chunk(0x1c, 1, 900, 700), fine.clone(), fine.clone(), fine].concat(),
        [vec![4, 1], reads.clone(), vec![0], chunk(5, 1, 5, 0), vec![0], chunk(6, 1, 0, 0)].concat(),
        [vec![1, 1], reads.clone(), (greeting.len() as u16).to_le_bytes().to_vec(), greeting, whole].concat(),
        [vec![3, 0], step(0, 0, 100), vec![20, 0], b"NBDMAGIC and then ...".to_vec()].concat(),
        [vec![0, 1], reads, vec![0], chunk(7, 0, 30, 0), vec![0x67; 40]].concat(),
    ]
}
