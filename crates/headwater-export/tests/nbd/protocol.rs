//! The server over a Unix socket, with clients that speak the protocol by hand: well, badly, and not to the end.

use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::{Client, SIZE, Server};
use headwater_nbd::{ClientAsk, Command, CommandFlags, ErrorCode, Headers, Request, TransmissionFlags};

pub(crate) fn read(cookie: u64, offset: u64, length: u64) -> Request {
    Request::new(Command::Read, cookie, offset, length)
}

pub(crate) fn write(cookie: u64, offset: u64, length: u64) -> Request {
    Request::new(Command::Write, cookie, offset, length)
}

/// Waits until `condition` holds, for a while.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..5000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("never: {what}");
}

#[test]
fn what_is_written_is_read_at_any_offset() {
    let server = Server::start();
    let mut client = server.client();
    let data: Vec<u8> = (0..9000_u32).map(|i| i as u8 | 1).collect();
    assert_eq!(client.ask(write(1, 4095, 9000), &data).error, None);
    assert_eq!(client.ask(read(2, 4095, 9000), &[]).data, data);
    assert_eq!(client.ask(read(3, 4094, 2), &[]).data, [0, 1]);
    assert_eq!(client.ask(read(4, SIZE, 0), &[]).error, None);
    assert_eq!(server.probe.flushes.load(Ordering::SeqCst), 0);
    assert_eq!(client.ask(Request::new(Command::Flush, 5, 0, 0), &[]).error, None);
    assert_eq!(server.probe.flushes.load(Ordering::SeqCst), 1);
}

/// A client may go on with our successor, should we be killed.
#[test]
fn what_would_go_with_the_process_is_flushed_before_the_answer() {
    let server = Server::start();
    let mut client = server.client();
    server.probe.unsettled.store(true, Ordering::SeqCst);
    assert_eq!(client.ask(write(1, 0, 4096), &[1; 4096]).error, None);
    assert_eq!(server.probe.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(client.ask(Request::new(Command::WriteZeroes, 2, 0, 4096), &[]).error, None);
    assert_eq!(server.probe.flushes.load(Ordering::SeqCst), 2);
    let durable = Request { flags: CommandFlags::FUA, ..write(3, 0, 4096) };
    assert_eq!(client.ask(durable, &[1; 4096]).error, None);
    assert_eq!(client.ask(Request::new(Command::Trim, 4, 0, 4096), &[]).error, None);
    assert_eq!(server.probe.flushes.load(Ordering::SeqCst), 2);
}

/// A client with compact headers, though the server has others.
fn compact(server: &Server) -> Client {
    Client::negotiate(server.connect(), ClientAsk { headers: Headers::Structured, ..ClientAsk::new("disk") })
}

#[test]
fn zeroes_come_as_holes_and_without_io() {
    let server = Server::start();
    let mut client = server.client();
    client.ask(write(1, 1 << 20, 4096), &[7; 4096]);
    let answer = client.ask(read(2, 2 << 20, 1 << 20), &[]);
    assert_eq!((answer.holes, answer.data.len()), (vec![(2 << 20, 1 << 20)], 0));
    assert_eq!(server.probe.read_bytes.load(Ordering::SeqCst), 0);
    // A mixture comes as data; so does everything where replies are simple.
    let answer = client.ask(read(3, (1 << 20) - 4096, 8192), &[]);
    assert_eq!((answer.holes.len(), answer.data.len()), (0, 8192));
    let simple = ClientAsk { headers: Headers::Simple, ..ClientAsk::new("disk") };
    let mut client = Client::negotiate(server.connect(), simple);
    client.send(read(4, 2 << 20, 4096), &[]);
    assert_eq!(client.answer(4096).data, [0; 4096]);
}

#[test]
fn block_status_tells_allocation_and_depth() {
    let server = Server::start();
    let mut client = server.client();
    let base = client.offer.context("base:allocation").unwrap();
    let depth = client.offer.context("qemu:allocation-depth").unwrap();
    client.ask(write(1, 65536, 8192), &[7; 8192]);
    let status = |flags| Request::new(Command::BlockStatus, 2, 0, 1 << 20).with_flags(flags);
    let rest = (1 << 20) - 65536 - 8192;
    let answer = client.ask(status(CommandFlags::NONE), &[]);
    let expected =
        [(base, vec![(65536, 3), (8192, 0), (rest, 3)]), (depth, vec![(65536, 0), (8192, 1), (rest, 0)])];
    assert_eq!(answer.status, expected);
    let answer = client.ask(status(CommandFlags::REQ_ONE), &[]);
    assert_eq!(answer.status, [(base, vec![(65536, 3)]), (depth, vec![(65536, 0)])]);
}

#[test]
fn zeroing_trimming_and_caching() {
    let server = Server::start();
    let mut client = server.client();
    client.ask(write(1, 0, 16384), &[7; 16384]);
    let request = |command, offset, flags| Request::new(command, 2, offset, 4096).with_flags(flags);
    use CommandFlags as F;
    assert_eq!(client.ask(request(Command::WriteZeroes, 0, F::FUA), &[]).error, None);
    assert_eq!(client.ask(request(Command::WriteZeroes, 4096, F::NO_HOLE), &[]).error, None);
    assert_eq!(client.ask(request(Command::Trim, 8192, F::FUA), &[]).error, None);
    assert_eq!(client.ask(request(Command::WriteZeroes, 12288, F::FAST_ZERO), &[]).error, None);
    let holes = client.ask(read(3, 0, 16384), &[]);
    assert_eq!(holes.data, [0; 16384], "the one with NO_HOLE keeps its place");
    assert_eq!(client.ask(request(Command::Cache, 0, F::NONE), &[]).error, None);
}

#[test]
fn requests_out_of_bounds_fail_and_the_client_goes_on() {
    let server = Server::start();
    let mut client = server.client();
    for (request, expected) in [
        (read(1, SIZE - 1, 2), ErrorCode::Invalid),
        (read(2, u64::MAX, 2), ErrorCode::Invalid),
        (read(3, 0, (32 << 20) + 1), ErrorCode::Invalid),
        (read(4, 0, (32 << 20) + 1).with_flags(CommandFlags::DF), ErrorCode::Overflow),
        (read(5, 0, 1).with_flags(CommandFlags::NO_HOLE), ErrorCode::Invalid),
        (Request::new(Command::WriteZeroes, 6, SIZE, 1), ErrorCode::NoSpace),
        (Request::new(Command::Trim, 7, SIZE, 1), ErrorCode::Invalid),
        (Request::new(Command::BlockStatus, 8, SIZE, 1), ErrorCode::Invalid),
        (Request::new(Command::Other(99), 9, 0, 0), ErrorCode::Invalid),
    ] {
        let answer = client.ask(request, &[]);
        assert_eq!(answer.error, Some(expected), "{request:?}");
        assert!(!answer.words.is_empty());
    }
    // The data of a refused write are skipped, however long. With extended headers there is a limit: see `extended`.
    let length = (32 << 20) + 5;
    let answer = compact(&server).ask(write(10, 0, length), &vec![0; length as usize]);
    assert_eq!(answer.error, Some(ErrorCode::Invalid));
    let answer = client.ask(write(11, SIZE - 1, 9000), &[0; 9000]);
    assert_eq!(answer.error, Some(ErrorCode::NoSpace));
    assert_eq!(client.ask(read(12, 0, 1), &[]).error, None);
    assert_eq!(server.probe.begun.load(Ordering::SeqCst), 0);
}

#[test]
fn a_read_only_export_is_not_changed() {
    let server = Server::start();
    let mut client = Client::negotiate(server.connect(), ClientAsk::new("read-only"));
    assert!(client.offer.flags.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(client.ask(write(1, 0, 4), b"data").error, Some(ErrorCode::Permission));
    assert_eq!(client.ask(Request::new(Command::Trim, 2, 0, 4), &[]).error, Some(ErrorCode::Permission));
    assert_eq!(client.ask(read(3, 0, 4), &[]).holes, [(0, 4)]);
    assert_eq!(client.ask(Request::new(Command::Flush, 4, 0, 0), &[]).error, None);
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let server = Server::start();
    let mut client = server.client();
    let mut sender = client.stream.try_clone().unwrap();
    // More than may be in flight, in bytes (200 x 1 MiB) as well as in number; the server must neither stall nor grow.
    let (large, small) = (200_u64, 5000_u64);
    let writer = std::thread::spawn(move || {
        for i in 0..large {
            let data = vec![i as u8 | 1; 1 << 20];
            sender
                .write_all(
                    &[&write(i, (i % 32) << 20, 1 << 20).encode(Headers::Extended)[..], &data].concat(),
                )
                .unwrap();
        }
        let requests: Vec<u8> = (0..small)
            .flat_map(|i| read(large + i, (i % 8192) * 4096, 4096).encode(Headers::Extended).to_vec())
            .collect();
        sender.write_all(&requests).unwrap();
        for i in 0..large {
            sender.write_all(&read(large + small + i, 0, 1 << 20).encode(Headers::Extended)).unwrap();
        }
    });
    let mut seen = vec![false; (2 * large + small) as usize];
    for _ in 0..seen.len() {
        let answer = client.answer(0);
        assert_eq!(answer.error, None);
        assert!(!std::mem::replace(&mut seen[answer.cookie as usize], true), "answered twice");
    }
    writer.join().unwrap();
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let server = Server::start();
    let mut client = server.client();
    client.ask(write(1, 0, 1 << 20), &vec![7; 1 << 20]);
    let requests: Vec<u8> =
        (0..1000).flat_map(|i| read(i, 0, 1 << 20).encode(Headers::Extended).to_vec()).collect();
    client.stream.write_all(&requests).unwrap();
    // 32 MiB of replies and what the socket holds, of 1000 MiB that were asked for.
    let read_bytes = || server.probe.read_bytes.load(Ordering::SeqCst);
    eventually("replies fill what they may", || read_bytes() >= 31 << 20);
    std::thread::sleep(Duration::from_millis(300));
    assert!(read_bytes() < 48 << 20, "{} bytes", read_bytes());
    // Others are not concerned.
    assert_eq!(server.client().ask(read(1, 0, 4096), &[]).data, [7; 4096]);
    for _ in 0..1000 {
        assert_eq!(client.answer(0).data.len(), 1 << 20);
    }
}

#[test]
fn a_write_goes_on_when_its_client_is_gone() {
    let server = Server::start();
    let mut client = server.client();
    server.probe.hold(true);
    client.send(write(1, 0, 4096), &[7; 4096]);
    eventually("the write begins", || server.probe.begun.load(Ordering::SeqCst) == 1);
    drop(client);
    let mut other = server.client();
    // A torn request and a lost step end sessions too, and drop nothing either.
    let mut torn = server.client();
    torn.send(write(2, 4096, 4096), &[7; 4096]);
    eventually("the write begins", || server.probe.begun.load(Ordering::SeqCst) == 2);
    torn.stream.write_all(b"GET / HTTP/1.1\r\nHost: not an NBD request\r\n").unwrap();
    assert!(torn.is_closed());
    assert_eq!(server.probe.ended.load(Ordering::SeqCst), 0);
    server.probe.hold(false);
    eventually("both writes end", || server.probe.ended.load(Ordering::SeqCst) == 2);
    assert_eq!(other.ask(read(3, 0, 8192), &[]).data, [7; 8192], "the disk is not poisoned");
}

#[test]
fn requests_before_a_disconnect_are_answered() {
    let server = Server::start();
    let mut client = server.client();
    server.probe.hold(true);
    client.send(write(1, 0, 4096), &[7; 4096]);
    client.send(Request::disconnect(), &[]);
    eventually("the write begins", || server.probe.begun.load(Ordering::SeqCst) == 1);
    server.probe.hold(false);
    assert_eq!(client.answer(0).cookie, 1);
    assert!(client.is_closed());
}

#[test]
fn a_client_that_closes_its_sending_side_gets_its_answers() {
    let server = Server::start();
    let mut client = server.client();
    client.send(write(1, 0, 4096), &[7; 4096]);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.answer(0).cookie, 1);
    assert!(client.is_closed());
}

#[test]
fn shutdown_finishes_requests_and_removes_the_socket() {
    let mut server = Server::start();
    let (mut busy, mut idle, mut haggling) = (server.client(), server.client(), server.connect());
    server.probe.hold(true);
    busy.send(write(1, 0, 4096), &[7; 4096]);
    eventually("the write begins", || server.probe.begun.load(Ordering::SeqCst) == 1);
    server.order_stop();
    assert!(idle.is_closed());
    let mut greeting = [0; 18];
    haggling.read_exact(&mut greeting).unwrap();
    assert_eq!(haggling.read(&mut greeting).unwrap(), 0);
    assert_eq!(server.probe.ended.load(Ordering::SeqCst), 0);
    server.probe.hold(false);
    assert_eq!(busy.answer(0).error, None);
    assert!(busy.is_closed());
    server.stop();
    assert!(!server.path("nbd.sock").exists());
}

#[test]
fn garbage_ends_its_own_connection_only() {
    let server = Server::start();
    let mut witness = server.client();
    witness.ask(write(1, 0, 4096), &[7; 4096]);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..60 {
        // Garbage instead of a greeting, of options, or of requests.
        let mut stream = match round % 3 {
            0 => server.connect(),
            1 => {
                let mut stream = server.connect();
                stream.write_all(&[0, 0, 0, 1]).unwrap();
                stream
            }
            _ => server.client().stream,
        };
        let garbage: Vec<u8> = (0..random() % 5000).map(|_| random() as u8).collect();
        // The server may have closed already.
        let _ = stream.write_all(&garbage);
        if round % 2 == 0 {
            drop(stream);
        } else {
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        assert_eq!(witness.ask(read(round, 0, 4096), &[]).data, [7; 4096]);
    }
    // Requests that are well-formed but senseless.
    let mut client = compact(&server);
    for _ in 0..200 {
        let (kind, flags) = (random() % 9, random() % 40);
        if matches!(kind, 1 | 2) {
            continue;
        }
        let mut request =
            Request::new(Command::from_wire(kind as u16), 5, random(), u64::from(random() as u32));
        request.flags = CommandFlags::from_bits(flags as u16);
        if kind != 3 {
            assert!(client.ask(request, &[]).error.is_some(), "{request:?}");
        }
    }
    assert_eq!(witness.ask(read(1, 0, 4096), &[]).data, [7; 4096]);
}
