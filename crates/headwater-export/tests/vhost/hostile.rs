//! Guests and front ends that write nonsense: it costs them their queue or their connection, and nobody else anything.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use headwater_sim::for_seeds;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::event::{EventfdFlags, eventfd};

use crate::server::*;
use headwater_front_end::protocol::*;
use headwater_front_end::*;

const IN: u32 = 0;
const OUT: u32 = 1;

const USUAL: u64 = feature::FLUSH | feature::INDIRECT | feature::EVENT_IDX;

/// The other export of the same process still works, and nothing was changed behind anybody's back.
fn check_other(server: &Server) {
    let guest = Guest::new();
    let (_client, mut ring) = Client::ready(&server.other_path(), &guest, feature::FLUSH);
    assert_eq!(ring.request(&guest, IN, 0, &[], 512), (0, vec![9; 512]));
}

#[test]
fn chains_of_nonsense_stop_their_queue_and_nothing_else() {
    type Write = fn(&Guest, &mut Ring) -> u16;
    let cases: [(&str, Write); 17] = [
        ("a loop of one", |guest, ring| {
            ring.descriptor(guest, 0, HEADER, 16, 1, 0);
            0
        }),
        ("a loop of two", |guest, ring| {
            ring.descriptor(guest, 0, HEADER, 16, 1, 1);
            ring.descriptor(guest, 1, HEADER, 16, 1, 0);
            0
        }),
        ("a next past the end", |guest, ring| {
            ring.descriptor(guest, 0, HEADER, 16, 1, QUEUE);
            0
        }),
        ("a head past the end", |_, _| QUEUE),
        ("a head far past the end", |_, _| u16::MAX),
        ("a header outside memory", |guest, ring| {
            ring.chain(guest, &[Piece { at: 1 << 40, len: 16, writable: false }])
        }),
        ("data that reach past the end of memory", |guest, ring| {
            let mut pieces = request_pieces(guest, OUT, 0, &[0; 512], 0);
            pieces[1].at = 2 * REGION - 511;
            ring.chain(guest, &pieces)
        }),
        ("data at the end of all addresses", |guest, ring| {
            let mut pieces = request_pieces(guest, OUT, 0, &[0; 512], 0);
            (pieces[1].at, pieces[1].len) = (u64::MAX - 10, 512);
            ring.chain(guest, &pieces)
        }),
        ("four gigabytes of data", |guest, ring| {
            let mut pieces = request_pieces(guest, IN, 0, &[], 512);
            pieces[1].len = u32::MAX;
            ring.chain(guest, &pieces)
        }),
        ("no outcome", |guest, ring| {
            let pieces = request_pieces(guest, OUT, 0, &[0; 512], 0);
            ring.chain(guest, &pieces[..2])
        }),
        ("an outcome of no bytes", |guest, ring| {
            let mut pieces = request_pieces(guest, OUT, 0, &[0; 512], 0);
            pieces[2].len = 0;
            ring.chain(guest, &pieces)
        }),
        ("a header that is too short", |guest, ring| {
            let mut pieces = request_pieces(guest, OUT, 0, &[], 0);
            pieces[0].len = 15;
            ring.chain(guest, &pieces)
        }),
        ("a header to be written", |guest, ring| {
            let mut pieces = request_pieces(guest, OUT, 0, &[0; 512], 0);
            pieces[0].writable = true;
            ring.chain(guest, &pieces)
        }),
        ("a table in a table", |guest, ring| {
            guest.write(0x8_0000, &descriptor(0x9_0000, 32, 4, 0));
            ring.descriptor(guest, 0, 0x8_0000, 16, 4, 0);
            0
        }),
        ("a table that isn't whole", |guest, ring| {
            ring.descriptor(guest, 0, 0x8_0000, 17, 4, 0);
            0
        }),
        ("a table outside memory", |guest, ring| {
            ring.descriptor(guest, 0, u64::MAX - 15, 64, 4, 0);
            0
        }),
        ("a table without end", |guest, ring| {
            ring.descriptor(guest, 0, 0x8_0000, 16 * 65535, 4, 0);
            0
        }),
    ];
    let server = Server::start(writable());
    for (name, write) in cases {
        let guest = Guest::new();
        let (client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
        let mut second = Ring::start(&client, &guest, 1, USUAL);
        let head = write(&guest, &mut ring);
        ring.offer(&guest, head);
        ring.kick();
        assert!(rings(&ring.error, Duration::from_secs(20)), "{name}: the front end hears of it");
        assert_eq!(ring.published(&guest), 0, "{name}");
        // The other queue of the same guest goes on; and this one does, set up anew.
        assert_eq!(second.request(&guest, IN, 0, &[], 512).0, 0, "{name}");
        client.ask(code::GET_VRING_BASE, &words(&[0, 0]));
        let mut ring = Ring::start(&client, &guest, 0, USUAL);
        assert_eq!(ring.request(&guest, IN, 0, &[], 512).0, 0, "{name}");
    }
    assert_eq!(server.probe.take_log(), []);
    check_other(&server);
}

#[test]
fn rings_of_nonsense_stop_their_queue() {
    let server = Server::start(writable());
    type Write = fn(&Guest, &mut Ring);
    let cases: [(&str, Write); 3] = [
        ("more offered than there is room for", |guest, ring| {
            guest.set_word(ring.places()[1] + 2, QUEUE + 1);
        }),
        ("what was offered is taken back", |guest, ring| guest.set_word(ring.places()[1] + 2, u16::MAX)),
        ("the same chain twice", |guest, ring| {
            let pieces = request_pieces(guest, OUT, 0, &[3; 512], 0);
            let head = ring.chain(guest, &pieces);
            let [_, available, _] = ring.places();
            guest.write(available + 4, &[head.to_le_bytes(), head.to_le_bytes()].concat());
            guest.set_word(available + 2, 2);
        }),
    ];
    for (name, write) in cases {
        let guest = Guest::new();
        let (client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
        server.probe.hold.store(true, Ordering::SeqCst);
        write(&guest, &mut ring);
        ring.kick();
        assert!(rings(&ring.error, Duration::from_secs(20)), "{name}");
        server.probe.hold.store(false, Ordering::SeqCst);
        drop(client);
    }
    check_other(&server);
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let open = || {
        let client = Client::connect(&server.path());
        client.negotiate(USUAL | feature::PROTOCOL | feature::VERSION_1);
        client.share(&guest);
        client
    };
    for size in [0, 3, 63, 2048, 65536, u32::MAX] {
        assert!(!open().tell(code::SET_VRING_NUM, &words(&[0, size]), &[]), "{size} descriptors");
    }
    let addresses = |index: u32, at: [u64; 3]| {
        let mut body = words(&[index, 0]);
        body.extend(longs(&[at[0], at[1], at[2], 0]));
        body
    };
    for index in [2, 255, u32::MAX] {
        assert!(!open().tell(code::SET_VRING_NUM, &words(&[index, 64]), &[]), "queue {index}");
        assert!(!open().tell(code::SET_VRING_ADDR, &addresses(index, [USER; 3]), &[]), "queue {index}");
        assert!(!open().tell(code::SET_VRING_BASE, &words(&[index, 0]), &[]), "queue {index}");
        assert!(!open().tell(code::SET_VRING_ENABLE, &words(&[index, 1]), &[]), "queue {index}");
        let client = open();
        client.send(code::GET_VRING_BASE, &words(&[index, 0]), &[], false);
        assert!(client.is_cut_off(), "queue {index}");
    }
    for at in [[0; 3], [USER - 16, USER, USER], [USER, USER + 2 * REGION, USER], [USER, USER, u64::MAX]] {
        assert!(!open().tell(code::SET_VRING_ADDR, &addresses(0, at), &[]), "{at:x?}");
    }
    let (used, available) = (USER + 0x1000, USER + 0x2000);
    for at in [[USER + 8, used, available], [USER, used + 2, available], [USER, used, available + 1]] {
        assert!(!open().tell(code::SET_VRING_ADDR, &addresses(0, at), &[]), "{at:x?}");
    }
    // Addresses that only show to be wrong with the queue's size.
    let end = USER + 2 * REGION;
    for at in [[end - 16, used, available], [USER, end - 4, available], [USER, used, end - 4]] {
        let client = open();
        let ring = Ring::new(0, USUAL);
        assert!(client.tell(code::SET_VRING_NUM, &words(&[0, 64]), &[]));
        assert!(client.tell(code::SET_VRING_ADDR, &addresses(0, at), &[]));
        assert!(client.tell(code::SET_VRING_ERR, &longs(&[0]), &[ring.error.as_fd()]));
        assert!(client.tell(code::SET_VRING_KICK, &longs(&[0]), &[ring.kick.as_fd()]));
        assert!(client.tell(code::SET_VRING_ENABLE, &words(&[0, 1]), &[]), "the export lives");
        assert!(rings(&ring.error, Duration::from_secs(20)), "{at:x?}");
        assert_eq!(client.capacity(), SIZE as u64 / 512);
    }
    // A file can't be waited for, and a descriptor that is gone tells nothing.
    let client = open();
    assert!(!client.tell(code::SET_VRING_KICK, &longs(&[0]), &[guest.file.as_fd()]));
    let client = open();
    client.send(code::SET_VRING_KICK, &longs(&[0x100]), &[], false);
    assert!(client.is_cut_off(), "queues are not polled");
    check_other(&server);
}

#[test]
fn a_kick_that_is_a_closed_socket_stops_the_queue() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (client, ring) = Client::ready(&server.path(), &guest, USUAL);
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(client.tell(code::SET_VRING_KICK, &longs(&[0]), &[theirs.as_fd()]));
    drop((ours, theirs));
    assert!(rings(&ring.error, Duration::from_secs(20)));
    assert_eq!(client.capacity(), SIZE as u64 / 512);
}

#[test]
fn a_kick_that_never_ends_keeps_nobody_else_from_working() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
    // Something to be read is always there, and less by one each time that it is.
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
    let endless = eventfd(u32::MAX, flags).unwrap();
    assert!(client.tell(code::SET_VRING_KICK, &longs(&[0]), &[endless.as_fd()]));
    check_other(&server);
    ring.kick = endless;
    assert_eq!(ring.request(&guest, IN, 0, &[], 512).0, 0, "the queue itself works as well");
    drop(client);
    check_other(&server);
}

#[test]
fn memory_that_cannot_be_is_refused() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let fd = guest.file.as_fd();
    let open = || {
        let client = Client::connect(&server.path());
        client.negotiate(USUAL | feature::PROTOCOL | feature::VERSION_1);
        client
    };
    let table = |regions: &[[u64; 4]]| {
        let mut body = words(&[regions.len() as u32, 0]);
        regions.iter().for_each(|region| body.extend(longs(region)));
        body
    };
    for regions in [
        &[[0, REGION, USER, 0], [REGION - 4096, REGION, USER + REGION, 0]][..],
        &[[0, 3 * REGION, USER, 0]],
        &[[0, REGION, USER, 2 * REGION]],
        &[[0, REGION, USER, 5]],
        &[[0, 0, USER, 0]],
        &[[u64::MAX - 4095, 8192, USER, 0]],
        &[[0, u64::MAX, USER, 0]],
        &[[0, REGION, USER, u64::MAX - 4095]],
        &[[0, 1 << 62, USER, 0]],
        &[[0, 17 << 40, USER, 0]],
    ] {
        let client = open();
        let fds = vec![fd; regions.len()];
        client.send(code::SET_MEM_TABLE, &table(regions), &fds, false);
        assert!(client.is_cut_off(), "{regions:x?}");
    }
    // Fewer and more descriptors than regions, and things that are no memory.
    let (socket, _other) = UnixStream::pair().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let directory = std::fs::File::open("/").unwrap();
    let one = table(&[[0, REGION, USER, 0]]);
    for fds in [&[][..], &[fd, fd], &[socket.as_fd()], &[null.as_fd()], &[directory.as_fd()], &[fd; 40]] {
        let client = open();
        client.send(code::SET_MEM_TABLE, &one, fds, false);
        assert!(client.is_cut_off(), "{fds:?}");
    }
    // The memory that was handed over can't be cut off any more.
    let client = open();
    client.share(&guest);
    assert!(guest.file.set_len(0).is_err());
    drop(client);
    let told = |size: u64, offset: u64, queues: u16, entries: u16| {
        let mut body = longs(&[size, offset]);
        body.extend(queues.to_le_bytes());
        body.extend(entries.to_le_bytes());
        body.extend([0; 4]);
        body
    };
    for body in [
        told(64, 0, 1, 64),
        told(4096, 2 * REGION, 1, 64),
        told(4096, 12, 1, 64),
        told(4096, 0, u16::MAX, u16::MAX),
        told(4096, 0, 0, 0),
    ] {
        let client = open();
        client.send(code::SET_INFLIGHT_FD, &body, &[fd], false);
        assert!(client.is_cut_off(), "{body:?}");
    }
    for body in [told(0, 0, 3, 64), told(0, 0, 1, 2048), told(0, 0, u16::MAX, u16::MAX)] {
        let client = open();
        client.send(code::GET_INFLIGHT_FD, &body, &[], false);
        assert!(client.is_cut_off(), "{body:?}");
    }
    check_other(&server);
}

#[test]
fn a_record_of_nonsense_stops_the_queue_or_is_put_right() {
    let server = Server::start(writable());
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..50 {
        let guest = Guest::new();
        let client = Client::connect(&server.path());
        client.negotiate(USUAL | feature::PROTOCOL | feature::VERSION_1);
        client.share(&guest);
        // In the guest's memory, full of nonsense behind a version that is right or not.
        let bytes: Vec<u8> =
            (0..4096).map(|_| if random.random() { random.random_range(0..64) } else { 0 }).collect();
        guest.write(REGION, &bytes);
        guest.set_word(REGION + 8, random.random_range(0..2));
        guest.set_word(REGION + 10, if random.random() { QUEUE } else { random.random() });
        let mut body = longs(&[4096, REGION]);
        body.extend([1, 0, QUEUE as u8, 0, 0, 0, 0, 0]);
        assert!(client.tell(code::SET_INFLIGHT_FD, &body, &[guest.file.as_fd()]));
        let ring = Ring::start(&client, &guest, 0, USUAL);
        ring.kick();
        assert_eq!(client.capacity(), SIZE as u64 / 512);
    }
    check_other(&server);
}

#[test]
fn messages_of_nonsense_end_their_connection() {
    let server = Server::start(writable());
    let message =
        |code: u32, flags: u32, size: u32, body: &[u8]| [&words(&[code, flags, size])[..], body].concat();
    for bytes in [
        message(0, 1, 0, &[]),
        message(u32::MAX, 1, 0, &[]),
        message(1, 0, 0, &[]),
        message(1, 2, 0, &[]),
        message(1, 5, 0, &[]),
        message(1, 1, 8, &[0; 8]),
        message(2, 1, 4, &[0; 4]),
        message(2, 1, 8, &[0xff; 8]),
        message(5, 1, 4, &[0; 4]),
        message(5, 1, 8, &[0xff; 8]),
        message(24, 1, 12, &[0xff; 12]),
        message(25, 1, 13, &[0xff; 13]),
        message(18, 1, 8, &[7; 8]),
        message(1, 1, u32::MAX, &[0; 64]),
        message(1, 1, 4097, &[0; 64]),
        message(21, 1, 0, &[]),
        message(34, 1, 0, &[]),
        message(12, 1, 8, &[0; 8]),
    ] {
        let client = Client::connect(&server.path());
        client.send_raw(&bytes, &[]).unwrap();
        assert!(client.is_cut_off(), "{bytes:?}");
    }
    // In the middle of a message, with and without a goodbye.
    for cut in [1, 11, 12, 15] {
        let client = Client::connect(&server.path());
        client.send_raw(&message(2, 1, 8, &[0; 8])[..cut], &[]).unwrap();
        client.socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(client.is_cut_off(), "after {cut} bytes");
    }
    // Descriptors where there should be none.
    let client = Client::connect(&server.path());
    client.send_raw(&message(1, 1, 0, &[]), &[client.socket.as_fd()]).unwrap();
    assert!(client.is_cut_off());
    // A message byte by byte is a message.
    let client = Client::connect(&server.path());
    for byte in message(1, 1, 0, &[]) {
        client.send_raw(&[byte], &[]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(client.receive(1).is_some());
    check_other(&server);
}

#[test]
fn a_client_that_reads_no_replies_holds_nobody_up() {
    let server = Server::start(writable());
    let deaf = Client::connect(&server.path());
    deaf.socket.set_nonblocking(true).unwrap();
    let question = words(&[code::GET_FEATURES, 1, 0]);
    let mut sent = 0;
    for _ in 0..100_000 {
        match deaf.send_raw(&question, &[]) {
            Ok(_) => sent += 1,
            Err(rustix::io::Errno::AGAIN) => break,
            Err(error) => panic!("{error}"),
        }
        if sent % 1000 == 0 {
            check_other(&server);
        }
    }
    check_other(&server);
}

#[test]
fn noise_does_no_harm() {
    let server = Server::start(writable());
    for_seeds(40, |seed| {
        let mut random = StdRng::seed_from_u64(seed);
        let guest = Guest::new();
        let (client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
        let _second = Ring::start(&client, &guest, 1, USUAL);
        // A guest that scribbles over its rings and tables while they are used.
        for _ in 0..100 {
            let at = random.random_range(0..0x4000_u64) & !1;
            let pieces =
                request_pieces(&guest, random.random_range(0..14), random.random_range(0..40), &[0; 48], 512);
            let head = ring.chain(&guest, &pieces);
            for _ in 0..random.random_range(0..4) {
                let place = ring.places()[0] + at;
                guest.write(place, &random.random::<[u8; 2]>());
            }
            ring.offer(&guest, head);
            ring.kick();
        }
        // A front end that says anything.
        client.socket.set_nonblocking(true).unwrap();
        for _ in 0..20 {
            let size = random.random_range(0..48_u32);
            let body: Vec<u8> =
                (0..size).map(|_| if random.random_bool(0.3) { random.random() } else { 0 }).collect();
            let bytes = [words(&[random.random_range(0..48), 1, size]), body].concat();
            let fds = vec![guest.file.as_fd(); random.random_range(0..2)];
            let _ = client.send_raw(&bytes, &fds);
        }
    });
    check_other(&server);
}
