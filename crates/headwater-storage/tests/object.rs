//! Objects in stores: the requests that servers see, and what becomes of their answers.
//!
//! These servers check no signature; `tests/objects` does all of it against a real store.

mod support;

use futures_util::future::join_all;
use headwater_block::{Error, ErrorKind, Node};
use headwater_storage::http::{HttpNode, HttpOptions};
use headwater_storage::object::{self, Keys, ObjectLocation};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;
use support::http::{Answer, Asked, HttpServer, proper};
use support::{pattern, read, run};
use tokio::time::Instant;

const SIZE: u64 = 8 << 20;
const TAG: &str = "ETag: \"one\"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n";
const SECRET: &str = "bm90LXRvLWJlLXRvbGQ=";

fn good(asked: &Asked) -> Answer {
    Answer::Send(proper(asked, SIZE, TAG))
}

fn simple(status: &str, headers: &str, body: &str) -> Answer {
    let len = body.len();
    Answer::Send(format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\n{headers}\r\n{body}").into_bytes())
}

fn options() -> HttpOptions {
    HttpOptions {
        connections: 4,
        request_timeout: Duration::from_secs(10),
        retry: Duration::from_secs(5),
        ..HttpOptions::default()
    }
}

fn keys() -> Keys {
    Keys::S3 { id: "ID".into(), secret: SECRET.into(), token: None }
}

async fn open(servers: &[&HttpServer]) -> Result<Rc<HttpNode>, Error> {
    open_with(servers, options().retry).await
}

async fn open_with(servers: &[&HttpServer], retry: Duration) -> Result<Rc<HttpNode>, Error> {
    open_as(servers, HttpOptions { retry, ..options() }).await
}

async fn open_as(servers: &[&HttpServer], options: HttpOptions) -> Result<Rc<HttpNode>, Error> {
    let endpoints: Vec<_> = servers.iter().map(|server| server.url("")).collect();
    let uri = format!("s3://bucket/a/k?region=here&endpoint={}", endpoints.join(","));
    object::open(&uri.parse().unwrap(), &keys(), options).await
}

#[test]
fn each_service_is_asked_in_its_own_words() {
    run(async {
        let heard = Rc::new(RefCell::new((String::new(), HashMap::new())));
        let hear = heard.clone();
        let server = HttpServer::start(move |asked| {
            hear.replace((asked.path.clone(), asked.headers.clone()));
            good(asked)
        })
        .await;
        let endpoint = server.url("");
        for (uri, keys, path, authorization) in [
            ("s3://bucket/a/k?region=here", keys(), "/bucket/a/k", "AWS4-HMAC-SHA256 Credential=ID/"),
            ("s3://bucket/a/k?anonymous", Keys::Environment, "/bucket/a/k", ""),
            ("gs://bucket/a/k?anonymous", Keys::Environment, "/bucket/a%2Fk", ""),
            ("az://box/a/k?account=me", Keys::AzureKey(SECRET.into()), "/box/a/k", "SharedKey me:"),
            ("az://box/a/k?account=me", Keys::AzureSas("sv=1&sig=x".into()), "/box/a/k?sv=1&sig=x", ""),
        ] {
            let mut location: ObjectLocation = uri.parse().unwrap();
            location.endpoints = vec![endpoint.clone()];
            let node = object::open(&location, &keys, options()).await.unwrap();
            assert_eq!((node.driver(), node.size(), node.is_read_only()), (&uri[..2], SIZE, true), "{uri}");
            assert_eq!(read(&*node, 5, 3 << 20).await.unwrap(), pattern(5, 3 << 20), "{uri}");
            let marks = node.identity().unwrap().contents;
            assert!(marks.contains(&("ETag", "\"one\"".to_owned())), "{marks:?}");
            let (asked, headers) = heard.borrow().clone();
            assert_eq!(asked, path, "{uri}");
            assert_eq!(headers.get("if-match").map(String::as_str), Some("\"one\""), "{uri}");
            let told = headers.get("authorization").cloned().unwrap_or_default();
            assert!(told.starts_with(authorization) && told.is_empty() == authorization.is_empty(), "{told}");
            assert_eq!(headers["host"], endpoint["http://".len()..]);
            assert!(!node.name().contains(SECRET) && !format!("{keys:?}").contains(SECRET));
            node.close().await.unwrap();
            assert_eq!(read(&*node, 1 << 20, 8).await.unwrap_err().kind(), ErrorKind::Closed);
        }
    });
}

#[test]
fn connections_are_bounded_and_kept_and_reads_may_be_dropped() {
    run(async {
        let server = HttpServer::start(good).await;
        let node = open(&[&server]).await.unwrap();
        server.delay.set(Duration::from_millis(10));
        for _ in 0..3 {
            let reads = join_all((0..20).map(|i| read(&*node, i << 18, 100_000))).await;
            assert!(reads.into_iter().zip(0..).all(|(got, i)| got.unwrap() == pattern(i << 18, 100_000)));
        }
        assert_eq!(server.most_at_once.get(), 4);
        assert_eq!(server.connections.get(), 4);
        for wait in 0..12 {
            let dropped = tokio::time::timeout(Duration::from_millis(wait), read(&*node, 0, 1 << 20)).await;
            drop(dropped);
        }
        assert_eq!(read(&*node, 9, 1 << 20).await.unwrap(), pattern(9, 1 << 20));
    });
}

#[test]
fn what_an_endpoint_fails_another_does_at_once() {
    run(async {
        let broken = Rc::new(Cell::new(false));
        let breaks = broken.clone();
        let first = HttpServer::start(move |asked| {
            let mut answer = proper(asked, SIZE, TAG);
            if breaks.get() {
                answer.truncate(answer.len() / 2);
                return Answer::SendAndClose(answer);
            }
            Answer::Send(answer)
        })
        .await;
        let second = HttpServer::start(good).await;
        // Without patience, so that a pause would be an error.
        let node = open_with(&[&first, &second], Duration::ZERO).await.unwrap();
        assert_eq!((first.requests.get(), second.requests.get()), (1, 0));
        broken.set(true);
        assert_eq!(read(&*node, 0, SIZE as usize).await.unwrap(), pattern(0, SIZE as usize));
        // What came before the break isn't fetched again.
        let fetched: u64 = second.ranges.borrow().iter().map(|range| range.end - range.start).sum();
        assert!(fetched < SIZE, "{fetched}");
        let asked = first.requests.get();
        read(&*node, 1 << 20, 1 << 20).await.unwrap();
        assert_eq!(first.requests.get(), asked, "the one that answers stays in use");
        // One that isn't there is no matter from the start.
        let nobody = HttpServer { port: 1, ..first };
        open(&[&nobody, &second]).await.unwrap();
        let err = open(&[&nobody]).await.err().unwrap();
        assert_eq!(err.kind(), ErrorKind::Unavailable, "{err}");
    });
}

#[test]
fn an_endpoint_that_trickles_is_left_for_another() {
    run(async {
        let first = HttpServer::start(|asked| match asked.number {
            0 => good(asked),
            _ => Answer::Trickle(proper(asked, SIZE, TAG)),
        })
        .await;
        let second = HttpServer::start(good).await;
        let hasty = HttpOptions { request_timeout: Duration::from_millis(600), ..options() };
        let node = open_as(&[&first, &second], hasty).await.unwrap();
        let start = Instant::now();
        assert_eq!(read(&*node, 1 << 20, 100_000).await.unwrap(), pattern(1 << 20, 100_000));
        assert!(start.elapsed() < Duration::from_secs(5), "it waited for all of it");
        assert!(second.ranges.borrow()[0].start > 1 << 20, "what had come is kept");
    });
}

#[test]
fn a_store_that_is_busy_is_asked_again_when_it_wants_to_be() {
    run(async {
        let server = HttpServer::start(|asked| match asked.number {
            1 => simple("503 Slow Down", "", "<Error><Code>SlowDown</Code></Error>"),
            2 => simple("429 Too Many Requests", "Retry-After: 1\r\n", ""),
            _ => good(asked),
        })
        .await;
        let node = open(&[&server]).await.unwrap();
        let begun = Instant::now();
        assert_eq!(read(&*node, 1 << 20, 100_000).await.unwrap(), pattern(1 << 20, 100_000));
        // The least of a first pause with its jitter, and the second that the store wants.
        assert!(begun.elapsed() >= Duration::from_millis(1050), "{:?}", begun.elapsed());
        assert_eq!(server.requests.get(), 4);
    });
}

#[test]
fn an_object_that_changes_is_never_mixed_in() {
    run(async {
        for change in 0..5 {
            let changed = Rc::new(Cell::new(false));
            let is_changed = changed.clone();
            let server = HttpServer::start(move |asked| {
                let other = "ETag: \"two\"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n";
                let later = "ETag: \"one\"\r\nLast-Modified: Tue, 02 Jan 2024 00:00:00 GMT\r\n";
                match (is_changed.get(), change) {
                    (false, _) => good(asked),
                    (_, 0) => Answer::Send(proper(asked, SIZE, other)),
                    (_, 1) => simple("412 Precondition Failed", "", ""),
                    (_, 2) => Answer::Send(proper(asked, SIZE + 512, TAG)),
                    (_, 3) => Answer::Send(proper(asked, 1 << 20, TAG)),
                    _ => Answer::Send(proper(asked, SIZE, later)),
                }
            })
            .await;
            let node = open(&[&server]).await.unwrap();
            assert_eq!(read(&*node, 1 << 20, 100_000).await.unwrap(), pattern(1 << 20, 100_000));
            changed.set(true);
            let err = read(&*node, 2 << 20, 100_000).await.unwrap_err();
            assert_eq!(err.kind(), ErrorKind::SourceChanged, "{change}: {err}");
            // For good, although it is as it was.
            changed.set(false);
            let asked = server.requests.get();
            assert_eq!(read(&*node, 0, 512).await.unwrap_err().kind(), ErrorKind::SourceChanged);
            assert_eq!(server.requests.get(), asked);
        }
    });
}

#[test]
fn an_empty_object_is_an_empty_disk() {
    run(async {
        let server = HttpServer::start(|asked| match asked.range {
            Some(_) => Answer::Send(proper(asked, 0, TAG)),
            None => simple("200 OK", TAG, ""),
        })
        .await;
        let node = open(&[&server]).await.unwrap();
        assert_eq!(node.size(), 0);
        assert_eq!(read(&*node, 0, 10).await.unwrap(), [0; 10]);
    });
}

#[test]
fn refusals_are_told_with_advice_and_without_secrets() {
    run(async {
        let xml = |code: &str| format!("<Error><Code>{code}</Code><Message>no</Message></Error>");
        for (status, code, kind, told) in [
            ("403 Forbidden", "SignatureDoesNotMatch", ErrorKind::PermissionDenied, "AWS_SECRET_ACCESS_KEY"),
            ("400 Bad Request", "ExpiredToken", ErrorKind::PermissionDenied, "new credentials"),
            ("404 Not Found", "NoSuchBucket", ErrorKind::NotFound, "NoSuchBucket: no"),
            ("301 Moved Permanently", "PermanentRedirect", ErrorKind::InvalidInput, "AWS_REGION"),
            ("200 OK", "", ErrorKind::Unsupported, "parts"),
            ("418 Teapot", "Odd", ErrorKind::Io, "418"),
        ] {
            let body = xml(code);
            let server = HttpServer::start(move |_| simple(status, "", &body)).await;
            let err = open(&[&server]).await.err().unwrap();
            assert_eq!(err.kind(), kind, "{err}");
            assert!(err.to_string().contains(told) && !err.to_string().contains(SECRET), "{err}");
            assert_eq!(server.requests.get(), 1, "{status}: asking again is of no use");
        }
        let server = HttpServer::start(|asked| {
            let answer =
                String::from_utf8_lossy(&proper(asked, SIZE, TAG)[..200]).replace("bytes 0-", "bytes 8-");
            Answer::SendAndClose(answer.into_bytes())
        })
        .await;
        let err = open(&[&server]).await.err().unwrap();
        assert!(err.to_string().contains("Requested"), "{err}");
    });
}
