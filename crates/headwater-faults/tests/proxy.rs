//! The proxy does to a client what it was told to, and nothing else.

use headwater_faults::{Answer, FaultProxy, Link, Outage, Protocol, Rule};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU64;
use std::time::Duration;

const BODY: usize = 100_000;

fn body() -> Vec<u8> {
    (0..BODY).map(|n| (n % 251) as u8).collect()
}

/// A server that answers every request with [`body`], and with every byte that it is sent if it isn't one of HTTP.
fn server(http: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((mut socket, _)) = listener.accept() {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(socket.try_clone().unwrap());
                if !http {
                    return drop(std::io::copy(&mut reader, &mut socket));
                }
                loop {
                    let mut line = String::new();
                    while line.trim().len() + 2 > 2 || line.is_empty() {
                        line.clear();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let head = format!(
                        "HTTP/1.1 206 Partial\r\nETag: \"one\"\r\nContent-Range: bytes 0-{}/{BODY}\r\nContent-Length: {BODY}\r\n\r\n",
                        BODY - 1
                    );
                    let _ = socket.write_all(head.as_bytes());
                    let _ = socket.write_all(&body());
                }
            });
        }
    });
    address
}

fn connect(proxy: &FaultProxy) -> std::io::Result<TcpStream> {
    let client = TcpStream::connect(proxy.address())?;
    client.set_read_timeout(Some(Duration::from_millis(300)))?;
    Ok(client)
}

/// One request on a connection of its own: the head of the answer, and what comes of the body.
fn get(proxy: &FaultProxy) -> (String, std::io::Result<Vec<u8>>) {
    let mut client = connect(proxy).unwrap();
    client.write_all(b"GET /image HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    let mut reader = BufReader::new(client);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return (head, Ok(Vec::new()));
        }
    }
    let length =
        head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).unwrap().parse().unwrap();
    let mut bytes = Vec::new();
    let read = reader.take(length).read_to_end(&mut bytes);
    (head, read.map(|_| bytes))
}

fn echo(client: &mut TcpStream, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    client.write_all(bytes)?;
    let mut back = vec![0; bytes.len()];
    client.read_exact(&mut back)?;
    Ok(back)
}

#[test]
fn bytes_pass_as_they_are_and_late_if_that_is_wanted() {
    let proxy = FaultProxy::start(server(false), Protocol::Plain).unwrap();
    let mut client = connect(&proxy).unwrap();
    assert_eq!(echo(&mut client, &body()).unwrap(), body());
    let link =
        Link { latency: Duration::from_millis(50), jitter: Duration::from_millis(20), ..Link::default() };
    proxy.set_link(link);
    let begun = proxy_time();
    assert_eq!(echo(&mut client, b"hello").unwrap(), b"hello");
    assert!(begun.elapsed().unwrap() >= Duration::from_millis(50));
    proxy.set_link(Link { rate: NonZeroU64::new(1_000_000), ..Link::default() });
    let begun = proxy_time();
    assert_eq!(echo(&mut client, &body()).unwrap(), body());
    assert!(begun.elapsed().unwrap() >= Duration::from_millis(95), "100 kB at 1 MB/s");
    proxy.set_link(Link { corrupt_every: NonZeroU64::new(4), ..Link::default() });
    assert_ne!(echo(&mut client, b"hello").unwrap(), b"hello");
    proxy.heal();
    assert_eq!(echo(&mut client, b"hello").unwrap(), b"hello");
    assert_eq!(proxy.seen().connections, 1);
}

#[expect(clippy::disallowed_methods, reason = "what the proxy does takes real time")]
fn proxy_time() -> std::time::SystemTime {
    std::time::SystemTime::now()
}

#[test]
fn connections_are_lost_refused_and_stall() {
    let proxy = FaultProxy::start(server(false), Protocol::Plain).unwrap();
    let mut client = connect(&proxy).unwrap();
    assert_eq!(echo(&mut client, b"hello").unwrap(), b"hello");
    proxy.begin(Outage::Stalled);
    let stalled = echo(&mut client, b"hello").unwrap_err();
    assert!(matches!(stalled.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{stalled}");
    proxy.end_outage();
    let mut late = [0; 5];
    client.read_exact(&mut late).unwrap();
    assert_eq!(&late, b"hello", "what had stalled goes on");
    proxy.begin_for(Outage::Refused, Duration::from_millis(300));
    assert!(echo(&mut client, b"hello").is_err());
    // The listener goes a moment later.
    let mut refused = 0;
    let begun = proxy_time();
    let mut client = loop {
        match connect(&proxy) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => refused += 1,
            Ok(mut client) => {
                if echo(&mut client, b"hello").is_ok() {
                    break client;
                }
            }
            Err(error) => panic!("{error}"),
        }
        assert!(begun.elapsed().unwrap() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(refused > 0);
    proxy.set_link(Link { cut_after: NonZeroU64::new(7).map(NonZeroU64::get), ..Link::default() });
    assert!(echo(&mut client, b"hello").is_err(), "ten bytes in all");
}

#[test]
fn answers_are_what_the_rules_make_of_them() {
    let proxy = FaultProxy::start(server(true), Protocol::Http).unwrap();
    let add = |answer| proxy.add(Rule::new(answer).times(1));
    let (head, whole) = get(&proxy);
    assert!(head.contains("206") && whole.unwrap() == body());
    add(Answer::Status { code: 429, retry_after: Some(7) });
    let (head, whole) = get(&proxy);
    assert!(head.starts_with("HTTP/1.1 429") && head.contains("Retry-After: 7") && whole.unwrap().is_empty());
    add(Answer::CutBody(70_000));
    assert_eq!(get(&proxy).1.unwrap(), body()[..70_000]);
    add(Answer::LengthOff(10));
    let (head, whole) = get(&proxy);
    assert!(head.contains(&format!("Content-Length: {}", BODY + 10)) && whole.unwrap() == body());
    add(Answer::RangeOff(5));
    assert!(get(&proxy).0.contains("bytes 5-"));
    add(Answer::Etag("\"two\"".into()));
    let (head, _) = get(&proxy);
    assert!(head.contains("\"two\"") && !head.contains("\"one\""));
    add(Answer::Corrupt);
    let rotten = get(&proxy).1.unwrap();
    assert_eq!(rotten.iter().zip(body()).filter(|(a, b)| **a != *b).count(), 1);
    add(Answer::StallBody(10));
    assert!(get(&proxy).1.is_err());
    add(Answer::Trickle(1));
    assert!(get(&proxy).1.is_err(), "a byte a second is too slow for it");
    add(Answer::Late(Duration::from_millis(100)));
    let begun = proxy_time();
    assert_eq!(get(&proxy).1.unwrap(), body());
    assert!(begun.elapsed().unwrap() >= Duration::from_millis(100));
    assert_eq!(proxy.seen().requests, 10);
    assert_eq!(proxy.seen().faults, 9);
}

#[test]
fn a_connection_serves_many_requests() {
    let proxy = FaultProxy::start(server(true), Protocol::Http).unwrap();
    proxy.add(Rule::new(Answer::Status { code: 503, retry_after: None }).one_in(2));
    let client = connect(&proxy).unwrap();
    let mut reader = BufReader::new(client.try_clone().unwrap());
    for n in 1..=6 {
        (&client).write_all(b"GET /image HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            reader.read_line(&mut head).unwrap();
        }
        if n % 2 == 0 {
            assert!(head.starts_with("HTTP/1.1 503"), "{head}");
        } else {
            let mut whole = vec![0; BODY];
            reader.read_exact(&mut whole).unwrap();
            assert_eq!(whole, body());
        }
    }
    assert_eq!((proxy.seen().connections, proxy.seen().requests), (1, 6));
}
