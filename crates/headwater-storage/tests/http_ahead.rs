//! What is asked for, and connected, before anybody reads: from a server that is far away, near, closes connections, or fails.

mod support;

use futures_util::future::join_all;
use headwater_block::{ErrorKind, Node};
use headwater_storage::http::{HttpNode, HttpOptions};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use support::http::{Answer, Asked, HttpServer, proper};
use support::{pattern, read, run};

const SIZE: u64 = 40 << 20;
const BLOCK: u64 = 64 << 10;
const TAG: &str = "ETag: \"one\"\r\n";

/// Long enough that other things are done meanwhile.
const AWAY: Duration = Duration::from_millis(100);

fn good(asked: &Asked) -> Answer {
    Answer::Send(proper(asked, SIZE, TAG))
}

async fn open(server: &HttpServer, read_ahead: u64) -> Rc<HttpNode> {
    let options = HttpOptions { retry: Duration::from_millis(500), read_ahead, ..HttpOptions::default() };
    HttpNode::open(&server.url("/disk.img"), options).await.unwrap()
}

/// Reads what a job would: copies of different sizes, all at once.
async fn job_reads(node: &Rc<HttpNode>, end: u64) {
    let copies = (0..end).step_by(700 << 10).map(|at| async move {
        let len = (700 << 10).min(end - at) as usize;
        assert_eq!(&read(&**node, at, len).await.unwrap()[..], &pattern(at, len)[..], "at {at}");
    });
    join_all(copies).await;
}

async fn pause(time: Duration) {
    tokio::time::sleep(time).await;
}

#[test]
fn what_a_job_begins_with_comes_while_other_things_are_done_and_comes_once() {
    run(async {
        let server = HttpServer::start(good).await;
        server.delay.set(AWAY);
        let node = open(&server, 4 << 20).await;
        let first = server.ranges.borrow().clone();
        assert!(
            first.len() > 4 && first.contains(&(0..BLOCK)),
            "more is asked for with the first request: {first:?}"
        );
        node.expect(0..16 << 20);
        // Making an overlay takes some time. The server tells of requests when it answers them.
        pause(2 * AWAY).await;
        let asked = server.ranges.borrow().clone();
        assert!(asked.len() > first.len(), "{asked:?}");
        let end = asked.iter().map(|range| range.end).max().unwrap();
        assert!(end <= 16 << 20, "{asked:?}");
        job_reads(&node, end).await;
        assert_eq!(server.ranges.borrow().len(), asked.len(), "nothing was asked for twice");
        // The first bytes again, from where small reads are kept; others anew.
        assert_eq!(&read(&*node, 0, 4096).await.unwrap()[..], &pattern(0, 4096)[..]);
        assert_eq!(server.ranges.borrow().len(), asked.len());
        job_reads(&node, 1 << 20).await;
        assert!(server.ranges.borrow().len() > asked.len());
        node.close().await.unwrap();
    });
}

#[test]
fn of_a_server_that_is_near_or_unwanted_nothing_is_asked_ahead() {
    run(async {
        let server = HttpServer::start(good).await;
        server.delay.set(AWAY);
        let node = open(&server, 0).await;
        pause(AWAY).await;
        assert_eq!(
            (server.ranges.borrow().len(), server.connections.get()),
            (1, 1),
            "nobody expects anything"
        );
        assert_eq!(server.ranges.borrow()[0], 0..BLOCK);
        // Connections alone, some of all.
        node.expect(0..0);
        pause(AWAY).await;
        let connections = server.connections.get();
        assert!((8..16).contains(&connections) && server.ranges.borrow().len() == 1, "{connections}");
        job_reads(&node, 8 << 20).await;
        assert!(server.connections.get() <= 16, "{}", server.connections.get());
        node.close().await.unwrap();
        // An object that is smaller than what was to be read ahead.
        let small = HttpServer::start(|asked| Answer::Send(proper(asked, 3 * BLOCK + 5, TAG))).await;
        small.delay.set(AWAY);
        let node = open(&small, 4 << 20).await;
        node.expect(0..16 << 20);
        let whole = 3 * BLOCK + 5;
        assert_eq!(&read(&*node, 0, whole as usize).await.unwrap()[..], &pattern(0, whole as usize)[..]);
        // The first, and what was asked for before the size was known.
        let asked = small.requests.get();
        assert_eq!(&read(&*node, 0, 10).await.unwrap()[..], &pattern(0, 10)[..]);
        assert_eq!(small.requests.get(), asked);
        node.close().await.unwrap();
    });
}

#[test]
fn servers_that_close_idle_connections_or_break_off_cost_nothing() {
    run(async {
        // Each connection ends after its answer, and the first one in the middle of what was to be read ahead.
        let first = Rc::new(Cell::new(true));
        let server = HttpServer::start(move |asked| {
            let mut bytes = proper(asked, SIZE, TAG);
            if first.replace(false) {
                bytes.truncate(1 << 20);
            }
            Answer::SendAndClose(bytes)
        })
        .await;
        server.delay.set(AWAY);
        let node = open(&server, 4 << 20).await;
        node.expect(0..8 << 20);
        job_reads(&node, 10 << 20).await;
        node.close().await.unwrap();
        // One that refuses all but the first request for a while: the reader's own request is answered.
        let refused = Rc::new(Cell::new(0));
        let count = refused.clone();
        let server = HttpServer::start(move |asked| {
            if asked.number > 0 && asked.number < 20 {
                count.set(count.get() + 1);
                return Answer::SendAndClose(
                    b"HTTP/1.1 503 Later\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec(),
                );
            }
            good(asked)
        })
        .await;
        server.delay.set(AWAY / 10);
        let node = open(&server, 0).await;
        node.expect(0..8 << 20);
        job_reads(&node, 8 << 20).await;
        assert!(refused.get() > 0);
        node.close().await.unwrap();
    });
}

#[test]
fn a_node_that_goes_gives_up_what_is_under_way() {
    run(async {
        let server = HttpServer::start(good).await;
        server.delay.set(AWAY);
        let node = open(&server, 4 << 20).await;
        node.expect(0..16 << 20);
        drop(node);
        pause(2 * AWAY).await;
        let asked = server.requests.get();
        pause(2 * AWAY).await;
        assert_eq!(server.requests.get(), asked);
    });
}

#[test]
fn what_came_ahead_of_another_object_is_never_read() {
    run(async {
        for for_good in [true, false] {
            // Which object it is, the first request tells.
            let server = HttpServer::start(move |asked| {
                let first = asked.range == Some(0..BLOCK);
                let unpinned = !asked.headers.contains_key("if-match");
                let other = !first && (for_good || unpinned);
                Answer::Send(proper(asked, SIZE, if other { "ETag: \"two\"\r\n" } else { TAG }))
            })
            .await;
            server.delay.set(AWAY);
            let node = open(&server, 4 << 20).await;
            node.expect(0..8 << 20);
            if for_good {
                for at in [1 << 20, 0, 20 << 20] {
                    let error = read(&*node, at, 1 << 20).await.unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::SourceChanged, "{error}");
                }
            } else {
                // It was another one for a moment, before it was pinned. Whoever reads that part asks for it.
                pause(3 * AWAY).await;
                job_reads(&node, 10 << 20).await;
            }
            node.close().await.unwrap();
        }
    });
}
