//! Extended headers: lengths of 64 bits, payloads where they belong and where they don't, and clients that lie about them.

use crate::common::{Client, SIZE, Server};
use crate::protocol::{read, write};
use headwater_nbd::{ClientAsk, Command, CommandFlags, ErrorCode, Headers, Request};

fn with_payload(command: Command, cookie: u64, payload: &[u8]) -> Request {
    let flags = CommandFlags::PAYLOAD_LEN;
    Request::new(command, cookie, 0, payload.len() as u64).with_flags(flags)
}

#[test]
fn both_forms_say_the_same() {
    let server = Server::start();
    let forms = [Headers::Structured, Headers::Extended];
    let mut clients = forms.map(|headers| {
        let client = Client::negotiate(server.connect(), ClientAsk { headers, ..ClientAsk::new("disk") });
        assert_eq!(client.offer.headers, headers);
        client
    });
    clients[0].ask(write(1, 4096, 8192), &[7; 8192]);
    let whole = SIZE - SIZE % 512;
    for request in [
        read(2, 0, 65536),
        read(3, 1 << 20, 4096),
        read(4, 5, 0),
        read(5, SIZE, 1),
        Request::new(Command::BlockStatus, 6, 0, whole),
        Request::new(Command::BlockStatus, 7, 0, whole).with_flags(CommandFlags::REQ_ONE),
        Request::new(Command::Flush, 8, 0, 0),
        Request::new(Command::Cache, 9, 0, whole),
        Request::new(Command::Other(77), 10, 0, 0),
    ] {
        let [compact, extended] = clients.each_mut().map(|client| client.ask(request, &[]));
        assert_eq!(format!("{compact:?}"), format!("{extended:?}"), "{request:?}");
    }
}

#[test]
fn a_status_request_that_names_contexts_is_answered_for_these() {
    let server = Server::start();
    let mut client = server.client();
    let base = client.offer.context("base:allocation").unwrap();
    let depth = client.offer.context("qemu:allocation-depth").unwrap();
    let mut ask = |length: u64, ids: &[u32]| {
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_be_bytes()).collect();
        let payload = [&length.to_be_bytes()[..], &ids].concat();
        client.ask(with_payload(Command::BlockStatus, 3, &payload), &payload)
    };
    assert_eq!(ask(4096, &[depth]).status, [(depth, vec![(4096, 0)])]);
    assert_eq!(ask(4096, &[depth, base]).status.len(), 2);
    for (length, ids) in [
        (4096, &[][..]),
        (4096, &[77]),
        (4096, &[base, base]),
        (4096, &[base, depth, 77]),
        (0, &[base]),
        (SIZE + 1, &[base]),
        (u64::MAX, &[base]),
    ] {
        assert_eq!(ask(length, ids).error, Some(ErrorCode::Invalid), "{length} {ids:?}");
    }
}

#[test]
fn payloads_that_nobody_asked_for_are_skipped() {
    let server = Server::start();
    let mut client = server.client();
    client.ask(write(1, 0, 4096), &[7; 4096]);
    for command in [Command::Read, Command::Trim, Command::Flush, Command::WriteZeroes, Command::Other(50)] {
        let payload = vec![9; 70_000];
        let answer = client.ask(with_payload(command, 2, &payload), &payload);
        assert_eq!(answer.error, Some(ErrorCode::Invalid), "{command:?}");
    }
    assert_eq!(client.ask(read(3, 0, 4096), &[]).data, [7; 4096], "nothing was done");
}

#[test]
fn ranges_beyond_the_end_are_refused_however_long() {
    let server = Server::start();
    let mut client = server.client();
    for (command, expected) in [
        (Command::WriteZeroes, ErrorCode::NoSpace),
        (Command::Trim, ErrorCode::Invalid),
        (Command::Cache, ErrorCode::Invalid),
        (Command::BlockStatus, ErrorCode::Invalid),
        (Command::Read, ErrorCode::Invalid),
    ] {
        for length in [SIZE + 1, 1 << 32, u64::MAX] {
            let answer = client.ask(Request::new(command, 4, 0, length), &[]);
            assert_eq!(answer.error, Some(expected), "{command:?} of {length} bytes");
        }
    }
}

#[test]
fn who_announces_more_than_is_taken_or_goes_back_to_compact_headers_is_cut_off() {
    let server = Server::start();
    for length in [(32 << 20) + 1, u64::MAX] {
        let mut client = server.client();
        client.send(Request::new(Command::Write, 5, 0, length), &[]);
        assert!(client.is_closed(), "a payload of {length} bytes");
        let mut client = server.client();
        client.send(Request::new(Command::Trim, 5, 0, length).with_flags(CommandFlags::PAYLOAD_LEN), &[]);
        assert!(client.is_closed(), "a payload of {length} bytes");
    }
    let mut client = server.client();
    client.offer.headers = Headers::Structured;
    client.send(read(6, 0, 4096), &[]);
    assert!(client.is_closed());
    assert_eq!(server.client().ask(read(7, 0, 16), &[]).error, None, "others are not concerned");
}
