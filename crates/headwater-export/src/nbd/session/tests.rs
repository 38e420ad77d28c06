//! Tests of the session with requests that complete when the test says so.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use headwater_block::Buffer;
use headwater_nbd::request::Terms;
use headwater_nbd::{Headers, Request, TransmissionFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::stop::Stop;

/// What the session and the test share.
#[derive(Default)]
struct Shared {
    started: Cell<usize>,
    ended: Cell<usize>,
    most: Cell<usize>,
    /// Requests that wait, each with its own permission to end.
    waiting: RefCell<Vec<Rc<Cell<bool>>>>,
}

impl Shared {
    fn let_all_end(&self) {
        for permission in self.waiting.take() {
            permission.set(true);
        }
    }
}

struct Fixture {
    shared: Rc<Shared>,
    client: UnixStream,
    stop: Stop,
    session: tokio::task::JoinHandle<End>,
}

fn start() -> Fixture {
    let terms = Terms {
        size: 1 << 40,
        flags: TransmissionFlags::HAS_FLAGS,
        minimum_block: 1,
        maximum_payload: 32 << 20,
        headers: Headers::Structured,
        contexts: false,
    };
    let (ours, client) = UnixStream::pair().unwrap();
    let (shared, stop) = (Rc::new(Shared::default()), Stop::new());
    let theirs = shared.clone();
    let handle = move |incoming: Incoming, cost| {
        let shared = theirs.clone();
        async move {
            shared.started.set(shared.started.get() + 1);
            shared.most.set(shared.most.get().max(shared.started.get() - shared.ended.get()));
            let permission = Rc::new(Cell::new(false));
            shared.waiting.borrow_mut().push(permission.clone());
            while !permission.get() {
                tokio::task::yield_now().await;
            }
            shared.ended.set(shared.ended.get() + 1);
            let Incoming::Request(request, _) = incoming else { panic!("all requests are good") };
            let data = Buffer::zeroed(request.length as usize);
            (Reply::data(request.cookie.into(), request.offset, data), cost)
        }
    };
    let listener = stop.listener();
    let session = tokio::task::spawn_local(async move {
        let (socket, receiver) = (Socket::unix(ours), Receiver::new(terms, Vec::new(), &[]));
        Session::new(socket, receiver, Replies::default(), &listener, Abort::new(), handle).run().await
    });
    Fixture { shared, client, stop, session }
}

fn in_runtime(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

fn reads(count: u64, length: u32) -> Vec<u8> {
    (0..count)
        .flat_map(|cookie| {
            Request::new(Command::Read, cookie, 0, length.into()).encode(Headers::Structured).to_vec()
        })
        .collect()
}

async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

#[test]
fn what_is_in_flight_is_bounded_in_bytes() {
    in_runtime(async {
        let mut fixture = start();
        let length = 3 << 20;
        fixture.client.write_all(&reads(30, length)).await.unwrap();
        settle().await;
        assert_eq!(fixture.shared.started.get(), 10, "32 MiB hold ten requests of 3 MiB");
        // Replies that are not read yet count, too.
        fixture.shared.let_all_end();
        settle().await;
        assert_eq!(fixture.shared.ended.get(), 10);
        assert!(fixture.shared.started.get() < 13, "what the socket holds makes room");
        let mut left = 30 * (28 + length as usize);
        let mut sink = vec![0; 1 << 20];
        while left > 0 {
            left -= fixture.client.read(&mut sink).await.unwrap();
            fixture.shared.let_all_end();
        }
        assert_eq!(fixture.shared.ended.get(), 30);
        assert!(fixture.shared.most.get() <= 10);
        drop(fixture.client);
        assert!(matches!(fixture.session.await.unwrap(), End::Left));
    });
}

#[test]
fn what_is_in_flight_is_bounded_in_number() {
    in_runtime(async {
        let mut fixture = start();
        let count = 3 * MAX_REQUESTS;
        fixture.client.write_all(&reads(count as u64, 1)).await.unwrap();
        settle().await;
        assert_eq!(fixture.shared.started.get(), MAX_REQUESTS);
        let mut left = count * 29;
        let mut sink = vec![0; 1 << 20];
        while left > 0 {
            fixture.shared.let_all_end();
            left -= fixture.client.read(&mut sink).await.unwrap();
        }
        assert_eq!(fixture.shared.ended.get(), count);
    });
}

#[test]
fn the_longest_request_fits_alone() {
    in_runtime(async {
        let mut fixture = start();
        fixture.client.write_all(&reads(2, 32 << 20)).await.unwrap();
        settle().await;
        assert_eq!(fixture.shared.started.get(), 1);
        let mut left = 2 * (28 + (32 << 20));
        let mut sink = vec![0; 1 << 20];
        while left > 0 {
            fixture.shared.let_all_end();
            left -= fixture.client.read(&mut sink).await.unwrap();
        }
    });
}

#[test]
fn a_session_outlives_its_client_until_its_requests_end() {
    in_runtime(async {
        for bytes in [reads(3, 4096), [reads(3, 4096), vec![0xee; 100]].concat()] {
            let mut fixture = start();
            fixture.client.write_all(&bytes).await.unwrap();
            settle().await;
            drop(fixture.client);
            settle().await;
            assert!(!fixture.session.is_finished());
            assert_eq!((fixture.shared.started.get(), fixture.shared.ended.get()), (3, 0));
            fixture.shared.let_all_end();
            let end = fixture.session.await.unwrap();
            assert!(matches!(end, End::CutOff(_) | End::Broken(_)), "{end:?}");
            assert_eq!(fixture.shared.ended.get(), 3);
        }
    });
}

#[test]
fn an_order_to_stop_lets_requests_end_and_replies_go_out() {
    in_runtime(async {
        let mut fixture = start();
        fixture.client.write_all(&reads(2, 4096)).await.unwrap();
        settle().await;
        fixture.stop.order();
        settle().await;
        // Heard by nobody any more.
        fixture.client.write_all(&reads(5, 4096)).await.unwrap();
        settle().await;
        assert_eq!(fixture.shared.started.get(), 2);
        fixture.shared.let_all_end();
        assert!(matches!(fixture.session.await.unwrap(), End::Stopped));
        let mut answers = Vec::new();
        // The connection ends with a reset where requests were left unread.
        let _ = fixture.client.read_to_end(&mut answers).await;
        assert_eq!(answers.len(), 2 * (28 + 4096));
    });
}
