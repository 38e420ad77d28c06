//! Tests of receiving: how the bytes are cut into pieces makes no difference.

use std::future::poll_fn;

use headwater_nbd::{CommandFlags, TransmissionFlags};
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::*;

const TERMS: Terms = Terms {
    size: 1 << 20,
    flags: TransmissionFlags::HAS_FLAGS,
    minimum_block: 1,
    maximum_payload: 200_000,
    structured: true,
    contexts: false,
};

/// What a receiver makes of `bytes`, as text: `first` of them were received with the negotiation, the rest comes over a
/// socket in pieces.
fn receive(bytes: &[u8], first: usize, piece: usize) -> Vec<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut socket = Socket::unix(ours);
        let first = first.min(bytes.len());
        let mut receiver = Receiver::new(TERMS, &bytes[..first]);
        let send = async {
            for piece in bytes[first..].chunks(piece) {
                // The other side stops reading after bytes that break the protocol.
                let _ = theirs.write_all(piece).await;
                tokio::task::yield_now().await;
            }
            drop(theirs);
        };
        let take = async {
            let mut seen = Vec::new();
            loop {
                match receiver.next(|_| true) {
                    Ok(Next::Incoming(Incoming::Request(request, data))) => {
                        let data = data.map(|data| data.to_vec());
                        assert_eq!(data.as_ref().map_or(0, Vec::len), request.payload_len() as usize);
                        seen.push(format!("{request:?} {data:?}"));
                    }
                    Ok(Next::Incoming(Incoming::Bad(request, code))) => {
                        seen.push(format!("{request:?} {code}"))
                    }
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

fn any_request() -> impl Strategy<Value = Vec<u8>> {
    (0_u16..9, prop_oneof![0_u32..5000, Just(180_000), Just(200_001)], 0_u64..1 << 20, any::<u8>()).prop_map(
        |(command, length, offset, fill)| {
            let request = Request::new(Command::from_wire(command), fill.into(), offset, length);
            let mut bytes = request.encode().to_vec();
            bytes.resize(Request::LEN + request.payload_len() as usize, fill);
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pieces_make_no_difference(
        requests in prop::collection::vec(any_request(), 0..8),
        garbage in prop::collection::vec(any::<u8>(), 0..40),
        first in 0_usize..100_000,
        piece in prop_oneof![1_usize..100, 1000_usize..100_000],
        torn in 0_usize..100,
    ) {
        let mut bytes = requests.concat();
        bytes.extend(garbage);
        bytes.truncate(bytes.len().saturating_sub(torn));
        prop_assume!(bytes.len() / piece < 20_000);
        let whole = receive(&bytes, 0, usize::MAX);
        prop_assert_eq!(receive(&bytes, first, piece), whole);
    }
}

#[test]
fn a_request_waits_until_there_is_room() {
    let request = Request::new(Command::Read, 1, 0, 4096).with_flags(CommandFlags::NONE);
    let mut receiver = Receiver::new(TERMS, &request.encode());
    assert!(matches!(receiver.next(|cost| cost < 4096), Ok(Next::Full)));
    assert!(receiver.is_mid_request());
    let Ok(Next::Incoming(incoming)) = receiver.next(|cost| cost < 8192) else { panic!("there is room") };
    assert!(memory_held(&incoming) >= 4096);
    assert!(!receiver.is_mid_request());
}
