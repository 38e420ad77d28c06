//! The NBD protocol's codec: negotiation of both sides, requests, replies.
//!
//! Input: a byte that chooses what it is for, a byte that says in which pieces it arrives, then what the other side sends.
//!
//! Asserted: how bytes are cut changes nothing (but behind STARTTLS); a state never asks for more than its limits, nor takes more than there is; what is sent is bounded;
//! nothing but the wish for TLS is said in clear by a client that wants it, and nothing but its refusal by such a server; a request and a chunk survive encoding;
//! what a read's chunks cover is exactly what they said.

use crate::Target;
use headwater_nbd::negotiate::{self, MAX_OPTION};
use headwater_nbd::{
    BlockSizes, ChunkKind, ClientAsk, ClientHandshake, Command, CommandFlags, ExportInfo, Headers,
    ListHandshake, ProtocolError, ReadCoverage, ReplyHeader, Request, ServerHandshake, ServerOffer,
    ServerOutcome, ServerRules, StatusFilter, Step, TlsHandshake, TransmissionFlags, reply,
};

/// See the module.
pub const TARGET: Target = Target { name: "nbd_codec", run, seeds, max_len: 4096 };

/// The longest message that a side waits for during negotiation: an option or its reply, with the header.
const MAX_MESSAGE: usize = MAX_OPTION as usize + 64;

fn run(data: &[u8]) {
    let Some((&[kind, cut], bytes)) = data.split_first_chunk() else { return };
    match kind % 6 {
        0 => both_ways(bytes, cut, client),
        1 => both_ways(bytes, cut, tls_client),
        2 => both_ways(bytes, cut, lister),
        3 => both_ways(bytes, cut, |arrivals| server(arrivals, false)),
        4 => both_ways(bytes, cut, |arrivals| server(arrivals, true)),
        _ => {
            requests(bytes);
            replies(bytes);
        }
    }
}

/// What a side made of what it got: what it sent, and how it ended.
#[derive(Debug, PartialEq)]
struct Talk {
    sent: Vec<u8>,
    end: String,
}

/// Bytes that arrive in pieces.
struct Arrivals<'a> {
    rest: &'a [u8],
    piece: usize,
    input: Vec<u8>,
}

impl Arrivals<'_> {
    /// Lets more arrive, up to `needed` bytes at least; false if nothing comes any more.
    fn more(&mut self, needed: usize) -> bool {
        assert!(needed > self.input.len(), "it asks for what it has");
        assert!(needed <= MAX_MESSAGE, "it asks for a message of {needed} bytes");
        let missing = (needed - self.input.len()).max(self.piece).min(self.rest.len());
        let (now, later) = self.rest.split_at(missing);
        self.input.extend_from_slice(now);
        self.rest = later;
        !now.is_empty()
    }

    fn take(&mut self, consumed: usize) {
        assert!(consumed <= self.input.len(), "it takes what isn't there");
        self.input.drain(..consumed);
    }
}

/// Asserts that it makes no difference how the bytes are cut.
fn both_ways(bytes: &[u8], cut: u8, talk: impl Fn(Arrivals<'_>) -> Talk) {
    let at_once = talk(Arrivals { rest: bytes, piece: usize::MAX, input: Vec::new() });
    let piece = usize::from(cut % 32) + 1;
    let in_pieces = talk(Arrivals { rest: bytes, piece, input: Vec::new() });
    // What follows STARTTLS in clear is noticed if it has come, and otherwise belongs to the session.
    assert!(at_once == in_pieces || at_once.end.contains("in clear"), "{at_once:?} != {in_pieces:?}");
}

fn ended(sent: Vec<u8>, error: &ProtocolError) -> Talk {
    let end = error.to_string();
    assert!(!end.is_empty() && !end.contains('\n'), "{end:?}");
    Talk { sent, end }
}

fn ask() -> ClientAsk {
    ClientAsk::new("disk")
}

fn client(arrivals: Arrivals<'_>) -> Talk {
    negotiate_as(ClientHandshake::new(ask()), arrivals, Vec::new())
}

fn negotiate_as(mut state: ClientHandshake, mut arrivals: Arrivals<'_>, mut sent: Vec<u8>) -> Talk {
    loop {
        match state.step(&arrivals.input, &mut sent) {
            Err(error) => return ended(sent, &error),
            Ok(Step::More { state: same, needed }) => {
                if !arrivals.more(needed) {
                    return ended(sent, &same.closed());
                }
                state = same;
            }
            Ok(Step::Next { state: next, consumed }) => {
                arrivals.take(consumed);
                state = next;
            }
            Ok(Step::Done { outcome, consumed }) => {
                arrivals.take(consumed);
                check_offer(&outcome);
                return Talk { sent, end: format!("{outcome:?}") };
            }
        }
        assert!(sent.len() < 16 << 10, "a client sends {} bytes to negotiate", sent.len());
    }
}

fn check_offer(offer: &ServerOffer) {
    assert!(offer.block_sizes.is_valid(), "{offer:?}");
    assert!(offer.headers.are_structured() || offer.contexts.is_empty(), "{offer:?}");
    let asked = ask().contexts;
    assert!(offer.contexts.iter().all(|context| asked.contains(&context.name)), "{offer:?}");
}

fn tls_client(mut arrivals: Arrivals<'_>) -> Talk {
    let mut sent = Vec::new();
    let mut state = TlsHandshake::new(ask());
    loop {
        match state.step(&arrivals.input, &mut sent) {
            Err(error) => return ended(sent, &error),
            Ok(Step::More { state: same, needed }) => {
                if !arrivals.more(needed) {
                    return ended(sent, &same.closed());
                }
                state = same;
            }
            Ok(Step::Next { state: next, consumed }) => {
                arrivals.take(consumed);
                state = next;
            }
            Ok(Step::Done { outcome, consumed }) => {
                arrivals.take(consumed);
                // Whoever drives it must find nothing left over. Here the rest is taken to come over TLS.
                return negotiate_as(outcome, arrivals, sent);
            }
        }
        // The answer to the greeting, and one option without data.
        assert!(sent.is_empty() || sent.len() == 20 && sent[4..].starts_with(b"IHAVEOPT\0\0\0\x05"));
    }
}

fn lister(mut arrivals: Arrivals<'_>) -> Talk {
    let mut sent = Vec::new();
    let mut state = ListHandshake::new();
    loop {
        match state.step(&arrivals.input, &mut sent) {
            Err(error) => return ended(sent, &error),
            Ok(Step::More { state: same, needed }) => {
                if !arrivals.more(needed) {
                    return ended(sent, &same.closed());
                }
                state = same;
            }
            Ok(Step::Next { state: next, consumed }) => {
                arrivals.take(consumed);
                state = next;
            }
            Ok(Step::Done { outcome, consumed }) => {
                arrivals.take(consumed);
                assert!(outcome.iter().all(|export| !export.description.contains(char::is_control)));
                return Talk { sent, end: format!("{outcome:?}") };
            }
        }
    }
}

fn exports() -> Vec<ExportInfo> {
    let export = |name: &str, size| ExportInfo {
        name: name.to_owned(),
        description: format!("what {name} is"),
        size,
        flags: TransmissionFlags::HAS_FLAGS,
        block_sizes: BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 },
        contexts: vec![negotiate::BASE_ALLOCATION.to_owned(), negotiate::ALLOCATION_DEPTH.to_owned()],
    };
    vec![export("disk", 1 << 20), export("", 0), export("other", 1 << 40)]
}

fn server(mut arrivals: Arrivals<'_>, tls: bool) -> Talk {
    let mut sent = Vec::new();
    let rules = ServerRules { tls, empty_name_is_only_export: false };
    let mut state = ServerHandshake::new(rules, &mut sent);
    let mut in_clear = tls;
    let mut options = 0_usize;
    loop {
        let before = sent.len();
        match state.step(exports, &arrivals.input, &mut sent) {
            Err(error) => return ended(sent, &error),
            Ok(Step::More { state: same, needed }) => {
                assert_eq!(sent.len(), before, "it says something and waits for the same");
                if !arrivals.more(needed) {
                    return Talk { sent, end: "the client left".to_owned() };
                }
                state = same;
            }
            Ok(Step::Next { state: next, consumed }) => {
                arrivals.take(consumed);
                options += 1;
                if in_clear {
                    check_refusal(&sent[before..]);
                }
                state = next;
            }
            Ok(Step::Done { outcome: ServerOutcome::StartTls(next), consumed }) => {
                assert!(in_clear, "TLS within TLS, or without credentials");
                arrivals.take(consumed);
                in_clear = false;
                state = *next;
            }
            Ok(Step::Done { outcome: ServerOutcome::Transmission(choice), consumed }) => {
                assert!(!in_clear, "requests are taken in clear");
                arrivals.take(consumed);
                assert!(exports().iter().any(|export| export.name == choice.export.name));
                assert!(choice.headers.are_structured() || choice.contexts.is_empty());
                return Talk { sent, end: format!("{choice:?}") };
            }
            Ok(Step::Done { outcome: ServerOutcome::Closed, consumed }) => {
                arrivals.take(consumed);
                return Talk { sent, end: "closed".to_owned() };
            }
        }
        // The longest answer is the list of exports, or a description with what goes before it.
        assert!(
            sent.len() <= 1024 * (options + 2),
            "{options} options make a server send {} bytes",
            sent.len()
        );
    }
}

/// Asserts that what is said in clear is nothing, a refusal, or the consent to leave.
fn check_refusal(said: &[u8]) {
    let Some(head) = said.first_chunk::<20>() else { return assert!(said.is_empty(), "{said:?}") };
    let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (option, kind, len) = (word(8), word(12), word(16));
    assert!(kind & 1 << 31 != 0 || option == 2 && len == 0, "said in clear: {}", said.escape_ascii());
    assert_eq!(said.len(), 20 + len as usize, "more than one reply");
}

fn requests(bytes: &[u8]) {
    for (start, flags, headers) in [
        (0, u16::MAX, Headers::Structured),
        (0, u16::MAX, Headers::Extended),
        (1, 1, Headers::Simple),
        (28, u16::MAX, Headers::Structured),
        (32, u16::MAX, Headers::Extended),
    ] {
        let Some(bytes) = bytes.get(start..) else { return };
        match Request::decode(bytes, headers) {
            Ok(None) => assert!(bytes.len() < Request::len_of(headers)),
            Ok(Some(request)) => {
                let again = request.encode(headers);
                // A write that says that no data follow is not to be made.
                let odd = headers.are_extended()
                    && request.command == Command::Write
                    && !request.flags.contains(CommandFlags::PAYLOAD_LEN);
                assert!(odd || *again == bytes[..Request::len_of(headers)]);
                let terms = headwater_nbd::Terms {
                    size: 1 << 20,
                    flags: TransmissionFlags::from_bits(flags),
                    minimum_block: 512,
                    maximum_payload: 32 << 20,
                    headers,
                    contexts: headers.are_structured(),
                };
                let filtered = headers.are_extended()
                    && request.command == Command::BlockStatus
                    && request.flags.contains(CommandFlags::PAYLOAD_LEN);
                if request.check(&terms).is_ok() {
                    // These have no range; what is in its place doesn't count.
                    let rangeless = matches!(request.command, Command::Flush | Command::Disconnect);
                    let ends = request.end().is_some_and(|end| end <= terms.size);
                    assert!(rangeless || filtered || ends, "{request:?} is not within the disk");
                }
                match request.payload_len(&terms) {
                    Ok(length) if headers.are_extended() => assert!(length <= terms.maximum_payload),
                    Ok(length) => assert!(length == 0 || request.command == Command::Write),
                    Err(_) => assert!(request.length > terms.maximum_payload.into()),
                }
                if filtered {
                    let payload = &bytes[Request::len_of(headers)..];
                    if let Ok(filter) = StatusFilter::decode(&request, payload, |id| id < 2, &terms) {
                        assert!(filter.request.end().is_some_and(|end| end <= terms.size));
                        assert!((1..=2).contains(&filter.contexts.len()));
                    }
                }
            }
            Err(error) => drop(ended(Vec::new(), &error)),
        }
    }
}

/// Takes a stream of replies apart as a client does that has one read on the way.
fn replies(bytes: &[u8]) {
    const MAX_DATA: u32 = 4096;
    let headers = match bytes.first().map(|byte| byte % 3) {
        Some(0) => Headers::Structured,
        Some(1) => Headers::Simple,
        _ => Headers::Extended,
    };
    let mut rest = bytes.get(1..).unwrap_or_default();
    let mut coverage = ReadCoverage::new(0x1000, MAX_DATA);
    let mut covered = vec![false; MAX_DATA as usize];
    while let Ok(Some((header, len))) = ReplyHeader::decode(rest, headers, MAX_DATA) {
        rest = &rest[len..];
        let ReplyHeader::Chunk(chunk) = header else {
            continue;
        };
        assert!(headers.are_structured());
        let limit = if chunk.kind == ChunkKind::BlockStatus {
            if headers.are_extended() {
                reply::MAX_EXTENDED_STATUS_PAYLOAD
            } else {
                reply::MAX_STATUS_PAYLOAD
            }
        } else {
            reply::MAX_CONTROL_PAYLOAD
        };
        assert!(chunk.length <= limit.max(MAX_DATA + 8));
        assert!(chunk.data_len() <= MAX_DATA);
        let Some(payload) = rest.get(..chunk.length as usize) else { return };
        rest = &rest[payload.len()..];
        let (offset, length) = match chunk.kind {
            ChunkKind::OffsetData => {
                let (offset, _) = payload.split_first_chunk().expect("there is an offset");
                (reply::decode_data_offset(*offset), chunk.data_len())
            }
            ChunkKind::OffsetHole => match reply::decode_hole(payload) {
                Ok(hole) => hole,
                Err(_) => continue,
            },
            ChunkKind::BlockStatus => {
                if let Ok((context, extents)) = reply::decode_block_status(payload, headers) {
                    assert!(!extents.is_empty() && extents.iter().all(|extent| extent.length > 0));
                    let mut again = Vec::new();
                    reply::encode_block_status(&mut again, chunk.to, context, &extents, chunk.done);
                    assert_eq!(&again[again.len() - payload.len()..], payload);
                }
                continue;
            }
            ChunkKind::Error | ChunkKind::ErrorOffset => {
                if let Ok(error) = reply::decode_error(chunk.kind, payload) {
                    assert!(!error.message.contains(char::is_control));
                }
                continue;
            }
            ChunkKind::None => continue,
        };
        if let Ok(range) = coverage.answer(offset, length) {
            assert_eq!((range.start as u64 + 0x1000, range.len()), (offset, length as usize));
            assert!(covered[range.clone()].iter().all(|there| !there), "a byte is answered twice");
            covered[range].fill(true);
        }
        assert_eq!(coverage.is_complete(), covered.iter().all(|there| *there));
        assert_eq!(coverage.finish().is_ok(), coverage.is_complete());
    }
}

/// An option as a client sends it.
fn option(code: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &code.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

/// A reply to an option, as a server sends it.
fn option_reply(code: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    [&magic[..], &code.to_be_bytes(), &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), rest].concat()
}

/// What a server sends that agrees to everything.
pub(super) fn agreeable_server(size: u64, headers: Headers) -> Vec<u8> {
    let agreed = if headers.are_extended() {
        option_reply(11, 1, &[])
    } else {
        [option_reply(11, 1 << 31 | 1, &[]), option_reply(8, 1, &[])].concat()
    };
    [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        agreed,
        option_reply(10, 4, b"\0\0\0\x01base:allocation"),
        option_reply(10, 1, &[]),
        option_reply(7, 3, &[&[0, 0][..], &size.to_be_bytes(), &[0x01, 0x6d]].concat()),
        option_reply(7, 3, &[0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 0, 16, 0, 0]),
        option_reply(7, 3, b"\0\x01name"),
        option_reply(7, 1, &[]),
    ]
    .concat()
}

/// What a client sends that wants everything of the export `disk`.
pub(super) fn eager_client(headers: Headers) -> Vec<u8> {
    [
        vec![0, 0, 0, 3],
        option(if headers.are_extended() { 11 } else { 8 }, &[]),
        option(3, &[]),
        option(9, &named("disk", &[0, 0, 0, 0])),
        option(10, &named("disk", &[&[0, 0, 0, 1][..], &named("base:allocation", &[])].concat())),
        option(6, &named("other", &[0, 1, 0, 3])),
        option(99, b"what is this"),
        option(7, &named("disk", &[0, 0])),
    ]
    .concat()
}

fn seeds() -> Vec<Vec<u8>> {
    let with = |kind: u8, cut: u8, bytes: Vec<u8>| [vec![kind, cut], bytes].concat();
    let chunk = |kind: u16, flags: u16, payload: &[u8]| {
        let head =
            [&[0x66, 0x8e, 0x33, 0xef][..], &flags.to_be_bytes(), &kind.to_be_bytes(), &7_u64.to_be_bytes()]
                .concat();
        [&head[..], &(payload.len() as u32).to_be_bytes(), payload].concat()
    };
    let at = |offset: u64| offset.to_be_bytes();
    let stream = [
        vec![0],
        chunk(2, 0, &[&at(0x1000)[..], &[0, 0, 0x0f, 0]].concat()),
        chunk(1, 0, &[&at(0x1f00)[..], &[9; 256]].concat()),
        chunk(5, 0, &[0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 3]),
        chunk(0x8001, 0, b"\0\0\0\x05\0\x04oops"),
        chunk(0x8002, 1, b"\0\0\0\x05\0\x02ah\0\0\0\0\0\0\x10\0"),
        chunk(0, 1, &[]),
    ];
    let request = [&[0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1][..], &at(42), &at(4096), &[0, 0, 2, 0]].concat();
    let extended_request = [
        [&[0x21, 0xe4, 0x1c, 0x71, 0, 0x20, 0, 7][..], &at(42), &at(4096), &at(12), &at(512)].concat(),
        vec![0, 0, 0, 1],
    ];
    let extended = |kind: u16, flags: u16, payload: &[u8]| {
        let head = [&[0x6e, 0x8a, 0x27, 0x8c][..], &flags.to_be_bytes(), &kind.to_be_bytes()].concat();
        [&head[..], &at(7), &at(0x1000), &at(payload.len() as u64), payload].concat()
    };
    let extended_stream = [
        vec![2],
        extended(2, 0, &[&at(0x1000)[..], &[0, 0, 0x0f, 0]].concat()),
        extended(1, 0, &[&at(0x1f00)[..], &[9; 256]].concat()),
        extended(6, 0, &[&[0, 0, 0, 1, 0, 0, 0, 1][..], &at(1 << 40), &at(3)].concat()),
        extended(0x8001, 1, b"\0\0\0\x05\0\x04oops"),
    ];
    let starttls = option_reply(5, 1, &[]);
    vec![
        with(0, 3, agreeable_server(1 << 30, Headers::Structured)),
        with(0, 3, agreeable_server(1 << 30, Headers::Extended)),
        with(0, 3, [b"NBDMAGICIHAVEOPT\0\0".to_vec(), at(4096).to_vec(), vec![0; 126]].concat()),
        with(0, 0, b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".to_vec()),
        with(
            1,
            5,
            [&b"NBDMAGICIHAVEOPT\0\x03"[..], &starttls, &agreeable_server(512, Headers::Structured)[18..]]
                .concat(),
        ),
        with(
            2,
            7,
            [
                b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
                option_reply(3, 2, &named("disk", b"a description")),
                option_reply(3, 2, &named("", &[])),
                option_reply(3, 1, &[]),
            ]
            .concat(),
        ),
        with(2, 7, [b"NBDMAGICIHAVEOPT\0\x03".to_vec(), option_reply(3, 1 << 31 | 2, b"no")].concat()),
        with(3, 9, eager_client(Headers::Structured)),
        with(3, 9, eager_client(Headers::Extended)),
        with(3, 9, [vec![0, 0, 0, 1], option(1, b"disk")].concat()),
        with(
            4,
            11,
            [vec![0, 0, 0, 3], option(5, &[]), eager_client(Headers::Structured)[4..].to_vec()].concat(),
        ),
        with(4, 11, eager_client(Headers::Structured)),
        with(5, 0, [request.clone(), request].concat()),
        with(5, 0, extended_request.concat()),
        with(5, 0, extended_stream.concat()),
        with(5, 0, stream.concat()),
        with(5, 0, [&[1, 0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &at(7), &[5; 64]].concat()),
    ]
}
