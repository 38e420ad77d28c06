//! The HTTP client against a server that misbehaves on demand.

mod support;

use futures_util::future::join_all;
use headwater_block::{Buffer, Error, ErrorKind, Extent, ExtentKind, Node, WriteFlags};
use headwater_storage::http::{HttpNode, HttpOptions};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use support::http::{Answer, Asked, HttpServer, proper};
use support::{pattern, read, run};

const SIZE: u64 = 40 << 20;
const TAG: &str = "ETag: \"one\"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n";

fn options() -> HttpOptions {
    HttpOptions {
        request_timeout: Duration::from_secs(10),
        retry: Duration::from_secs(2),
        ..HttpOptions::default()
    }
}

fn good(asked: &Asked) -> Answer {
    Answer::Send(proper(asked, SIZE, TAG))
}

async fn open(server: &HttpServer, path: &str) -> Result<Rc<HttpNode>, Error> {
    HttpNode::open(&server.url(path), options()).await
}

/// The error of opening from a server that answers like that.
async fn open_error(handler: impl Fn(&Asked) -> Answer + 'static) -> Error {
    let server = HttpServer::start(handler).await;
    match open(&server, "/disk.img").await {
        Ok(_) => panic!("it was opened"),
        Err(error) => error,
    }
}

fn simple(status: &str, headers: &str, body: &str) -> Answer {
    let len = body.len();
    Answer::Send(format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\n{headers}\r\n{body}").into_bytes())
}

#[test]
fn reads_of_any_alignment_give_what_the_server_holds() {
    run(async {
        let server = HttpServer::start(good).await;
        let node = open(&server, "/disk.img").await.unwrap();
        assert_eq!((node.size(), node.driver(), node.is_read_only()), (SIZE, "http", true));
        assert!(node.limits().remote);
        let marks = node.identity().unwrap().contents;
        let told = |name: &str| marks.iter().find(|(mark, _)| *mark == name).map(|(_, value)| value.as_str());
        assert_eq!(told("ETag"), Some("\"one\""));
        assert_eq!(told("Last-Modified"), Some("Mon, 01 Jan 2024 00:00:00 GMT"));
        let reads = (0..30_u64).map(|i| {
            let (offset, len) = (i * 317_003 % (SIZE - (8 << 20)), (i * i * 1999 % 2_500_000) as usize);
            let node = &node;
            async move {
                assert!(read(&**node, offset, len).await.unwrap() == pattern(offset, len), "{offset} {len}")
            }
        });
        join_all(reads).await;
        let mut expected = pattern(SIZE - 10, 10);
        expected.resize(100, 0);
        assert_eq!(read(&*node, SIZE - 10, 100).await.unwrap(), expected);
        assert_eq!(read(&*node, SIZE + 5, 8).await.unwrap(), [0; 8]);
        assert_eq!(node.status(0..SIZE + 10).await.unwrap().end(), SIZE);
        assert_eq!(node.status(SIZE..SIZE + 10).await.unwrap(), Extent::new(SIZE, 10, ExtentKind::Zero));
        let refused = node.write(0, Buffer::copy_of(b"x"), WriteFlags::default()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
        node.close().await.unwrap();
        assert_eq!(read(&*node, SIZE / 2, 8).await.unwrap_err().kind(), ErrorKind::Closed);
    });
}

#[test]
fn connections_are_kept_bounded_and_used_together() {
    run(async {
        let server = HttpServer::start(good).await;
        server.delay.set(Duration::from_millis(10));
        let node =
            HttpNode::open(&server.url("/"), HttpOptions { connections: 5, ..options() }).await.unwrap();
        assert!(read(&*node, 1, 20 << 20).await.unwrap() == pattern(1, 20 << 20));
        let reads = join_all((0..40).map(|i| read(&*node, i << 16, 40_000))).await;
        for (i, done) in (0..).zip(reads) {
            assert!(done.unwrap() == pattern(i << 16, 40_000));
        }
        assert_eq!(server.most_at_once.get(), 5);
        assert!(server.connections.get() <= 5, "{}", server.connections.get());
    });
}

#[test]
fn small_reads_next_to_each_other_cost_one_request() {
    run(async {
        let server = HttpServer::start(good).await;
        let node = open(&server, "/disk.img").await.unwrap();
        let header = join_all((0..16).map(|i| read(&*node, i * 4096, 4096))).await;
        assert!(header.into_iter().zip(0..).all(|(got, i)| got.unwrap() == pattern(i * 4096, 4096)));
        assert_eq!(server.requests.get(), 1, "opening brought the header");
        let table = join_all((0..64).map(|i| read(&*node, (1 << 20) + i * 1024, 1024))).await;
        assert!(
            table.into_iter().zip(0..).all(|(got, i)| got.unwrap() == pattern((1 << 20) + i * 1024, 1024))
        );
        assert_eq!(server.requests.get(), 2);
        assert_eq!(server.ranges.borrow()[1], 1 << 20..(1 << 20) + (64 << 10));
    });
}

#[test]
fn a_dropped_read_harms_nobody() {
    run(async {
        let server = HttpServer::start(good).await;
        let node =
            HttpNode::open(&server.url("/"), HttpOptions { connections: 2, ..options() }).await.unwrap();
        server.delay.set(Duration::from_millis(10));
        for i in 0..12 {
            let wait = Duration::from_millis(i * 3);
            let _ = tokio::time::timeout(wait, read(&*node, i << 20, 3 << 20)).await;
            let _ = tokio::time::timeout(wait, read(&*node, (i << 20) + 500_000, 3000)).await;
        }
        assert!(read(&*node, 77, 5 << 20).await.unwrap() == pattern(77, 5 << 20));
        assert_eq!(
            read(&*node, (3 << 20) + 500_000, 3000).await.unwrap(),
            pattern((3 << 20) + 500_000, 3000)
        );
    });
}

#[test]
fn servers_that_cannot_send_parts_are_refused() {
    run(async {
        let ignores = |_: &Asked| simple("200 OK", "", "the whole file");
        let error = open_error(ignores).await;
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("/disk.img") && error.to_string().contains("200"), "{error}");
        let endless = |_: &Asked| Answer::SendAndStall(b"HTTP/1.1 200 OK\r\n\r\nxxxxxxxx".to_vec());
        assert_eq!(open_error(endless).await.kind(), ErrorKind::Unsupported);
        let no_range = |_: &Asked| simple("206 Partial Content", "", "x");
        assert_eq!(open_error(no_range).await.kind(), ErrorKind::Corrupt);
        let unknown_size = |_: &Asked| simple("206 Partial Content", "Content-Range: bytes 0-0/*\r\n", "x");
        assert_eq!(open_error(unknown_size).await.kind(), ErrorKind::Corrupt);
        let other_range = |_: &Asked| simple("206 Partial Content", "Content-Range: bytes 5-5/10\r\n", "x");
        assert_eq!(open_error(other_range).await.kind(), ErrorKind::Corrupt);
        let other_length = |_: &Asked| simple("206 Partial Content", "Content-Range: bytes 0-9/10\r\n", "x");
        assert_eq!(open_error(other_length).await.kind(), ErrorKind::Corrupt);
    });
}

#[test]
fn refusals_and_garbage_are_named() {
    run(async {
        assert_eq!(open_error(|_| simple("404 Not Found", "", "")).await.kind(), ErrorKind::NotFound);
        assert_eq!(open_error(|_| simple("403 Forbidden", "", "")).await.kind(), ErrorKind::PermissionDenied);
        let garbage = open_error(|_| Answer::SendAndClose(b"NBDMAGICIHAVEOPT\0\x03 not http".to_vec())).await;
        assert_eq!(garbage.kind(), ErrorKind::Corrupt, "{garbage}");
        let chunks = open_error(|_| {
            let head = "HTTP/1.1 206 P\r\nContent-Range: bytes 0-9/10\r\nTransfer-Encoding: chunked\r\n\r\n";
            Answer::SendAndClose(format!("{head}zzzz\r\nnonsense\r\n").into_bytes())
        });
        let chunks = chunks.await;
        assert_eq!(chunks.kind(), ErrorKind::Corrupt, "{chunks}");
        let too_much = open_error(|_| {
            let head = "HTTP/1.1 206 P\r\nContent-Range: bytes 0-2/3\r\nTransfer-Encoding: chunked\r\n\r\n";
            Answer::Send(format!("{head}4\r\nabcd\r\n0\r\n\r\n").into_bytes())
        });
        assert_eq!(too_much.await.kind(), ErrorKind::Corrupt);
        let Err(gone) = HttpNode::open("http://127.0.0.1:1/x", options()).await else { panic!() };
        assert_eq!(gone.kind(), ErrorKind::Unavailable, "{gone}");
        let Err(gone) = HttpNode::open("http://host.invalid/x?secret", options()).await else { panic!() };
        assert_eq!(gone.kind(), ErrorKind::Unavailable, "{gone}");
        assert!(!gone.to_string().contains("secret"), "{gone}");
    });
}

#[test]
fn chunks_that_add_up_are_fine_and_so_is_an_empty_file() {
    run(async {
        let server = HttpServer::start(|_| {
            let head = "HTTP/1.1 206 P\r\nContent-Range: bytes 0-2/3\r\nTransfer-Encoding: chunked\r\n\r\n";
            Answer::Send(format!("{head}1\r\na\r\n2\r\nbc\r\n0\r\n\r\n").into_bytes())
        });
        let node = open(&server.await, "/").await.unwrap();
        assert_eq!(read(&*node, 0, 4).await.unwrap(), b"abc\0");
        let server = HttpServer::start(|asked| Answer::Send(proper(asked, 0, "")));
        let node = open(&server.await, "/").await.unwrap();
        assert_eq!((node.size(), read(&*node, 0, 2).await.unwrap()), (0, vec![0, 0]));
    });
}

#[test]
fn a_changed_source_is_noticed_and_never_read_again() {
    run(async {
        let changed =
            ["ETag: \"two\"\r\n", "", "ETag: \"one\"\r\nLast-Modified: Tue, 02 Jan 2024 00:00:00 GMT\r\n"];
        for now in changed {
            let server = HttpServer::start(move |asked| {
                let first = asked.number == 0;
                if !first {
                    assert_eq!(asked.headers["if-match"], "\"one\"");
                }
                // From the third on, it is the old one again: too late.
                let headers = if asked.number == 1 { now } else { TAG };
                Answer::Send(proper(asked, SIZE, headers))
            });
            let node = open(&server.await, "/").await.unwrap();
            for _ in 0..2 {
                let error = read(&*node, 1 << 20, 4096).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::SourceChanged, "{error}");
            }
        }
        let other_size = |asked: &Asked| Answer::Send(proper(asked, SIZE + asked.number as u64, TAG));
        let node = open(&HttpServer::start(other_size).await, "/").await.unwrap();
        assert_eq!(read(&*node, 1 << 20, 65536).await.unwrap_err().kind(), ErrorKind::SourceChanged);
        let condition = |asked: &Asked| {
            if asked.number == 0 { good(asked) } else { simple("412 Precondition Failed", "", "") }
        };
        let node = open(&HttpServer::start(condition).await, "/").await.unwrap();
        assert_eq!(read(&*node, 1 << 20, 65536).await.unwrap_err().kind(), ErrorKind::SourceChanged);
    });
}

#[test]
fn a_weak_tag_is_compared_but_not_made_a_condition() {
    run(async {
        let headers = "ETag: W/\"weak\"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n";
        let server = HttpServer::start(move |asked| {
            assert!(!asked.headers.contains_key("if-match"));
            let date = (asked.number > 0).then_some("Mon, 01 Jan 2024 00:00:00 GMT");
            assert_eq!(asked.headers.get("if-unmodified-since").map(String::as_str), date);
            Answer::Send(proper(asked, SIZE, headers))
        });
        let node = open(&server.await, "/").await.unwrap();
        assert!(read(&*node, 1 << 20, 65536).await.unwrap() == pattern(1 << 20, 65536));
    });
}

#[test]
fn what_passes_is_tried_again() {
    run(async {
        let server = HttpServer::start(|asked| match asked.number % 6 {
            1 => simple("503 Service Unavailable", "", "busy"),
            2 => Answer::SendAndClose(proper(asked, SIZE, TAG)[..700].to_vec()),
            3 => Answer::SendAndClose(Vec::new()),
            4 => simple("429 Too Many Requests", "Retry-After: 1\r\n", ""),
            _ => good(asked),
        });
        let server = server.await;
        let node = open(&server, "/").await.unwrap();
        let start = tokio::time::Instant::now();
        assert!(read(&*node, 1 << 20, 1 << 20).await.unwrap() == pattern(1 << 20, 1 << 20));
        assert!(start.elapsed() >= Duration::from_secs(1), "Retry-After was not honoured");
        let asked = server.ranges.borrow().clone();
        assert!(asked[3].start > 1 << 20, "what had come was asked for again: {asked:?}");
    });
}

#[test]
fn patience_ends() {
    run(async {
        let server = HttpServer::start(|asked| {
            if asked.number == 0 { good(asked) } else { simple("503 Service Unavailable", "", "") }
        });
        let server = server.await;
        let impatient = HttpOptions { retry: Duration::from_millis(800), ..options() };
        let node = HttpNode::open(&server.url("/"), impatient).await.unwrap();
        let start = tokio::time::Instant::now();
        let error = read(&*node, 1 << 20, 4096).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(start.elapsed() < Duration::from_secs(2) && server.requests.get() > 3);
        assert!(error.to_string().contains("503"), "{error}");
        // One that says that it needs no rest gets the rest that others do.
        let hurries = HttpServer::start(|asked| {
            if asked.number == 0 {
                good(asked)
            } else {
                simple("503 Service Unavailable", "Retry-After: 0\r\n", "")
            }
        });
        let hurries = hurries.await;
        let impatient = HttpOptions { retry: Duration::from_millis(800), ..options() };
        let node = HttpNode::open(&hurries.url("/"), impatient).await.unwrap();
        read(&*node, 1 << 20, 4096).await.unwrap_err();
        assert!((3..20).contains(&hurries.requests.get()), "{}", hurries.requests.get());
        let wants = |_: &Asked| simple("503 Service Unavailable", "Retry-After: 3600\r\n", "");
        let error = open_error(wants).await;
        assert!(error.to_string().contains("3600"), "{error}");
    });
}

#[test]
fn a_server_that_stalls_is_given_up() {
    run(async {
        let server = HttpServer::start(|asked| match asked.number {
            0 => good(asked),
            1 => Answer::SendAndStall(proper(asked, SIZE, TAG)[..5000].to_vec()),
            2 => Answer::SendAndStall(Vec::new()),
            _ => good(asked),
        });
        let hasty = HttpOptions { request_timeout: Duration::from_millis(300), ..options() };
        let node = HttpNode::open(&server.await.url("/"), hasty).await.unwrap();
        assert!(read(&*node, 1 << 20, 100_000).await.unwrap() == pattern(1 << 20, 100_000));
    });
}

#[test]
fn a_response_that_trickles_is_given_up_and_the_rest_asked_for() {
    run(async {
        let server = HttpServer::start(|asked| match asked.number {
            1 | 2 => Answer::Trickle(proper(asked, SIZE, TAG)),
            _ => good(asked),
        });
        let server = server.await;
        let hasty = HttpOptions { request_timeout: Duration::from_millis(600), ..options() };
        let node = HttpNode::open(&server.url("/"), hasty).await.unwrap();
        let start = tokio::time::Instant::now();
        assert!(read(&*node, 1 << 20, 100_000).await.unwrap() == pattern(1 << 20, 100_000));
        assert!(start.elapsed() < Duration::from_secs(9), "it waited for all of it");
        let asked = server.ranges.borrow().clone();
        assert!(
            asked[2].start > asked[1].start && asked[3].start > asked[2].start,
            "what had come is kept: {asked:?}"
        );
    });
}

#[test]
fn redirects_are_followed_within_reason() {
    run(async {
        let server = HttpServer::start(|asked| match asked.path.as_str() {
            "/disk.img" => simple("302 Found", "Location: /hop?to=2\r\n", ""),
            "/hop?to=2" => simple("308 Permanent Redirect", "Location: real\r\n", ""),
            "/real" => good(asked),
            "/loop" => simple("301 Moved Permanently", "Location: /loop\r\n", ""),
            _ => simple("302 Found", "Location: ftp://elsewhere/\r\n", ""),
        });
        let server = server.await;
        let node = open(&server, "/disk.img").await.unwrap();
        assert!(read(&*node, 1 << 20, 65536).await.unwrap() == pattern(1 << 20, 65536));
        assert_eq!(server.requests.get(), 4, "the way is remembered");
        let Err(error) = open(&server, "/loop").await else { panic!() };
        assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("redirects"), "{error}");
        let Err(error) = open(&server, "/other").await else { panic!() };
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    });
}

#[test]
fn an_address_that_a_redirect_led_to_may_expire() {
    run(async {
        let server = HttpServer::start(|asked| match (asked.path.as_str(), asked.number) {
            ("/disk.img", 0) => simple("302 Found", "Location: /signed-1\r\n", ""),
            ("/disk.img", _) => simple("302 Found", "Location: /signed-2\r\n", ""),
            ("/signed-1", 1) | ("/signed-2", _) => good(asked),
            _ => simple("403 Forbidden", "", "expired"),
        });
        let node = open(&server.await, "/disk.img").await.unwrap();
        for _ in 0..2 {
            assert!(read(&*node, 1 << 20, 65536).await.unwrap() == pattern(1 << 20, 65536));
        }
    });
}

/// Where the certificates of the test below are, in the environment of its second run.
const CERTIFICATES: &str = "HEADWATER_TEST_CERTIFICATES";

/// The roots come from the environment, which only a new process can have changed: the test runs itself again.
#[test]
fn https_checks_the_servers_certificate() {
    if let Ok(directory) = std::env::var(CERTIFICATES) {
        return run(https(directory));
    }
    let directory = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(directory.path())
        .output()
        .expect("openssl is needed for this test");
    assert!(made.status.success(), "{made:?}");
    let again = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "https_checks_the_servers_certificate"])
        .env(CERTIFICATES, directory.path())
        .env("SSL_CERT_FILE", directory.path().join("cert.pem"))
        .output()
        .unwrap();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stdout));
}

async fn https(directory: String) {
    use rustls::pki_types::pem::PemObject;
    let cert = rustls::pki_types::CertificateDer::from_pem_file(format!("{directory}/cert.pem")).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::from_pem_file(format!("{directory}/key.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .unwrap();
    let server = HttpServer::start_with(good, Some(Arc::new(config).into())).await;
    let node = HttpNode::open(&format!("https://localhost:{}/x", server.port), options()).await.unwrap();
    assert_eq!(node.driver(), "https");
    assert!(read(&*node, 5, 3 << 20).await.unwrap() == pattern(5, 3 << 20));
    let wrong_name = HttpNode::open(&format!("https://127.0.0.1:{}/x", server.port), options()).await;
    let Err(error) = wrong_name else { panic!("the wrong name was accepted") };
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("TLS") && error.to_string().contains("SSL_CERT_FILE"), "{error}");
    let plain = HttpNode::open(&server.url("/x"), options()).await;
    assert!(plain.is_err(), "http to a server of https");
}
