//! Tests of receiving: how the bytes are cut into pieces makes no difference.

use std::future::poll_fn;

use headwater_nbd::{CommandFlags, Headers, TransmissionFlags};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::*;

const TERMS: Terms = Terms {
    size: 1 << 20,
    flags: TransmissionFlags::HAS_FLAGS,
    minimum_block: 1,
    maximum_payload: 200_000,
    headers: Headers::Structured,
    contexts: true,
};

const EXTENDED: Terms = Terms {
    headers: Headers::Extended,
    flags: TransmissionFlags::HAS_FLAGS.union(TransmissionFlags::BLOCK_STATUS_PAYLOAD),
    ..TERMS
};

fn contexts() -> Vec<MetaContext> {
    ["a", "b"].into_iter().zip(0..).map(|(name, id)| MetaContext { id, name: name.to_owned() }).collect()
}

/// What a receiver makes of `bytes`, as text: `first` of them were received with the negotiation, the rest comes over a
/// socket in pieces.
fn receive(terms: Terms, bytes: &[u8], first: usize, piece: usize) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut socket = Socket::unix(ours);
        let first = first.min(bytes.len());
        let mut receiver = Receiver::new(terms, contexts(), &bytes[..first]);
        let send = async {
            for piece in bytes[first..].chunks(piece) {
                // The other side stops reading after bytes that break the protocol.
                let _ = theirs.write_all(piece).await;
                tokio::task::yield_now().await;
            }
            drop(theirs);
        };
        // Takes its side of the socket with it when it ends, so that the other side isn't held up by what nobody will read.
        let take = async move {
            let mut seen = Vec::new();
            loop {
                match receiver.next(|_| true) {
                    Ok(Next::Incoming(Incoming::Request(request, data))) => {
                        let data = data.map(|data| data.to_vec());
                        let length = request.payload_len(&terms).unwrap();
                        assert_eq!(data.as_ref().map_or(0, Vec::len), length as usize);
                        seen.push(format!("{request:?} {data:?}"));
                    }
                    Ok(Next::Incoming(Incoming::Bad(request, code))) => {
                        seen.push(format!("{request:?} {code}"))
                    }
                    Ok(Next::Incoming(Incoming::Status(filter))) => seen.push(format!("{filter:?}")),
                    Ok(Next::Full) => panic!("all was admitted"),
                    Ok(Next::More) => match poll_fn(|cx| receiver.poll_receive(cx, &mut socket)).await {
                        Ok(true) => {}
                        Ok(false) => {
                            seen.push(format!("end, torn: {}", receiver.is_mid_request()));
                            return seen;
                        }
                        Err(error) => panic!("{error}"),
                    },
                    Err(error) => {
                        seen.push(error.to_string());
                        return seen;
                    }
                }
            }
        };
        let (seen, ()) = futures_util::future::join(take, send).await;
        seen
    })
}

fn any_request(terms: Terms) -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![0_u64..40, 0_u64..5000, Just(180_000), Just(200_001)];
    (0_u16..9, length, 0_u64..1 << 20, any::<u8>(), any::<bool>()).prop_map(
        move |(command, length, offset, fill, payload)| {
            let mut request = Request::new(Command::from_wire(command), fill.into(), offset, length);
            if payload {
                request.flags |= CommandFlags::PAYLOAD_LEN;
            }
            let mut bytes = request.encode(terms.headers).to_vec();
            let sent = Request::decode(&bytes, terms.headers).unwrap().unwrap();
            bytes.resize(bytes.len() + sent.payload_len(&terms).unwrap_or(0) as usize, fill & 1);
            bytes
        },
    )
}

/// Requests, and the terms that they are sent on.
fn any_requests() -> impl Strategy<Value = (Terms, Vec<Vec<u8>>)> {
    prop::sample::select(vec![TERMS, EXTENDED])
        .prop_flat_map(|terms| (Just(terms), prop::collection::vec(any_request(terms), 0..8)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pieces_make_no_difference(
        (terms, requests) in any_requests(),
        garbage in prop::collection::vec(any::<u8>(), 0..40),
        first in 0_usize..100_000,
        piece in prop_oneof![1_usize..100, 1000_usize..100_000],
        torn in 0_usize..100,
    ) {
        let mut bytes = requests.concat();
        bytes.extend(garbage);
        bytes.truncate(bytes.len().saturating_sub(torn));
        prop_assume!(bytes.len() / piece < 20_000);
        let whole = receive(terms, &bytes, 0, usize::MAX);
        prop_assert_eq!(receive(terms, &bytes, first, piece), whole);
    }
}

#[test]
fn a_request_waits_until_there_is_room() {
    let request = Request::new(Command::Read, 1, 0, 4096).with_flags(CommandFlags::NONE);
    let mut receiver = Receiver::new(TERMS, Vec::new(), &request.encode(TERMS.headers));
    assert!(matches!(receiver.next(|cost| cost < 4096), Ok(Next::Full)));
    assert!(receiver.is_mid_request());
    let Ok(Next::Incoming(incoming)) = receiver.next(|cost| cost < 8192) else { panic!("there is room") };
    assert!(memory_held(&incoming) >= 4096);
    assert!(!receiver.is_mid_request());
}

#[test]
fn payloads_that_nobody_asked_for_are_skipped_and_too_long_ones_are_not() {
    let with = |command, length: u64, payload: &[u8]| {
        let request = Request::new(command, 1, 0, length).with_flags(CommandFlags::PAYLOAD_LEN);
        [&request.encode(Headers::Extended), payload].concat()
    };
    let length = 512_u64.to_be_bytes();
    let ids = [&length[..], &[0, 0, 0, 1, 0, 0, 0, 0]].concat();
    let bytes = [
        with(Command::BlockStatus, 16, &ids),
        with(Command::BlockStatus, 20, &[&ids[..], &[0, 0, 0, 2]].concat()),
        with(Command::Read, 100_000, &[7; 100_000]),
        with(Command::BlockStatus, 12, &ids[..12]),
        with(Command::Trim, 200_001, &[]),
    ];
    let seen = receive(EXTENDED, &bytes.concat(), 0, 1000);
    assert!(seen[0].contains("contexts: [1, 0]"), "{}", seen[0]);
    for bad in &seen[1..3] {
        assert!(bad.starts_with("Request") && !bad.ends_with("None"), "{bad}");
    }
    assert!(seen[3].contains("contexts: [1]"), "{}", seen[3]);
    assert!(seen[4].contains("200001") && seen.len() == 5, "{seen:?}");
}
