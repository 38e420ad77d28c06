//! What a guest's driver is offered, and what its requests do.

use std::sync::atomic::Ordering;

use std::time::Duration;

use headwater_export::vhost::{BlkOptions, LogicalBlock};

use crate::server::*;
use headwater_front_end::protocol::*;
use headwater_front_end::*;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// The features of a driver that flushes.
const USUAL: u64 = feature::FLUSH | feature::INDIRECT | feature::EVENT_IDX;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed) | 1).collect()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(words(&[sectors, flags]));
    bytes
}

#[test]
fn features_and_configuration_say_what_there_is() {
    let server = Server::start(writable());
    let client = Client::connect(&server.path());
    let offered = client.ask(code::GET_FEATURES, &[]).number();
    let all = feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::DISCARD
        | feature::WRITE_ZEROES
        | feature::INDIRECT
        | feature::EVENT_IDX
        | feature::PROTOCOL
        | feature::VERSION_1;
    assert_eq!(offered, all);
    client.negotiate(feature::PROTOCOL | feature::FLUSH | feature::CONFIG_WCE);
    assert_eq!(client.ask(code::GET_QUEUE_NUM, &[]).number(), 2);
    assert!(client.ask(code::GET_MAX_MEM_SLOTS, &[]).number() >= 32);
    let config = client.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(client.capacity(), SIZE as u64 / 512);
    assert_eq!((word(12), word(20)), (126, 512), "segments, block");
    assert_eq!((config[24], config[26], word(28)), (0, 1, 128), "physical block, smallest and best request");
    assert_eq!((config[32], config[34]), (1, 2), "cache mode, queues");
    assert_eq!((word(36), word(40), word(44)), (4 << 20, 32, 128), "discards");
    assert_eq!((word(48), word(52), config[56]), (4 << 20, 32, 1), "zeroes");
    assert!(client.set_wce(0));
    assert_eq!(client.config()[32], 0);
}

#[test]
fn bytes_go_where_they_belong() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (_client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
    let mut model = vec![0; SIZE];
    // A queue's indices wrap more than once, and requests grow beyond what is done at a time and across regions of memory.
    for round in 0..70_u8 {
        let len = 512 * [1, 8, 3, 4096, 64, 5000][usize::from(round) % 6];
        let sector = u64::from(round) * 37 % (SIZE as u64 / 512 - 5000);
        let at = sector as usize * 512;
        let data = pattern(len, round);
        assert_eq!(ring.request(&guest, OUT, sector, &data, 0).0, 0);
        model[at..at + len].copy_from_slice(&data);
        let (status, read) = ring.request(&guest, IN, sector.saturating_sub(2), &[], len as u32);
        let from = at.saturating_sub(1024);
        assert!(status == 0 && read == model[from..from + len], "round {round}");
    }
    assert!(server.contents() == model);
}

/// The guest goes on with our successor, should we be killed.
#[test]
fn what_would_go_with_the_process_is_flushed_before_the_answer() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (_client, mut ring) = Client::ready(&server.path(), &guest, USUAL | feature::WRITE_ZEROES);
    server.probe.unsettled.store(true, Ordering::SeqCst);
    assert_eq!(ring.request(&guest, OUT, 0, &pattern(4096, 1), 0).0, 0);
    assert_eq!(server.probe.take_log(), [Did::Write { offset: 0, len: 4096, fua: false }, Did::Flush]);
    assert_eq!(ring.request(&guest, WRITE_ZEROES, 0, &range(0, 8, 0), 0).0, 0);
    let zero = Did::Zero { offset: 0, len: 4096, fua: false, unmap: false };
    assert_eq!(server.probe.take_log(), [zero, Did::Flush]);
}

#[test]
fn zeroes_discards_flushes_and_names() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let features = USUAL | feature::DISCARD | feature::WRITE_ZEROES;
    let (_client, mut ring) = Client::ready(&server.path(), &guest, features);
    let data = pattern(64 << 10, 1);
    assert_eq!(ring.request(&guest, OUT, 0, &data, 0).0, 0);
    server.probe.take_log();

    let list = [range(8, 8, 0), range(32, 16, 1)].concat();
    assert_eq!(ring.request(&guest, WRITE_ZEROES, 0, &list, 0).0, 0);
    let zero = |offset, len, unmap| Did::Zero { offset, len, fua: false, unmap };
    assert_eq!(server.probe.take_log(), [zero(4096, 4096, false), zero(16384, 8192, true)]);
    assert_eq!(ring.request(&guest, DISCARD, 0, &range(64, 8, 0), 0).0, 0);
    assert_eq!(server.probe.take_log(), [Did::Discard { offset: 32768, len: 4096 }]);
    assert_eq!(ring.request(&guest, FLUSH, 0, &[], 0).0, 0);
    assert_eq!(server.probe.take_log(), [Did::Flush]);
    let (status, id) = ring.request(&guest, GET_ID, 0, &[], 20);
    assert_eq!((status, &id[..5]), (0, &b"disk\0"[..]));

    let mut model = data;
    model[4096..8192].fill(0);
    model[16384..16384 + 8192].fill(0);
    let contents = server.contents();
    assert!(contents[..32768] == model[..32768]);

    // What isn't offered, and what can't be.
    let status =
        |ring: &mut Ring, kind, sector, data: &[u8], room| ring.request(&guest, kind, sector, data, room).0;
    assert_eq!(status(&mut ring, 77, 0, &[], 0), 2);
    assert_eq!(status(&mut ring, DISCARD, 0, &range(0, 8, 1), 0), 2, "discards know no unmap");
    assert_eq!(status(&mut ring, WRITE_ZEROES, 0, &range(0, 8, 2), 0), 2);
    for bad in [vec![], vec![0; 15], range(0, u32::MAX, 0), range(u64::MAX, 8, 0), range(0, 8, 0).repeat(33)]
    {
        assert_eq!(status(&mut ring, DISCARD, 0, &bad, 0), 1);
        assert_eq!(status(&mut ring, WRITE_ZEROES, 0, &bad, 0), 1);
    }
    // The first range is sound, the second is not: nothing is done.
    server.probe.take_log();
    let half = [range(0, 8, 0), range(1 << 40, 8, 0)].concat();
    assert_eq!(status(&mut ring, WRITE_ZEROES, 0, &half, 0), 1);
    assert_eq!(server.probe.take_log(), []);
    let end = SIZE as u64 / 512;
    for (sector, len) in [(end, 512), (end - 1, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 511), (0, 513)] {
        assert_eq!(status(&mut ring, IN, sector, &[], len), 1, "{len} bytes at sector {sector}");
        assert_eq!(status(&mut ring, OUT, sector, &vec![1; len as usize], 0), 1);
    }
    assert_eq!(server.probe.take_log(), []);
    assert_eq!(status(&mut ring, IN, 0, &[], 512), 0, "and the queue goes on");
}

#[test]
fn a_driver_that_cannot_flush_has_its_writes_through() {
    let write = |fua| [Did::Write { offset: 0, len: 512, fua }];
    for (features, wce, through) in [
        (0, None, true),
        (feature::FLUSH, None, false),
        (feature::FLUSH | feature::CONFIG_WCE, None, false),
        (feature::FLUSH | feature::CONFIG_WCE, Some(0), true),
    ] {
        let server = Server::start(writable());
        let guest = Guest::new();
        let features = features | feature::DISCARD | feature::WRITE_ZEROES;
        let (client, mut ring) = Client::ready(&server.path(), &guest, features);
        if let Some(wce) = wce {
            assert!(client.set_wce(wce));
        }
        assert_eq!(ring.request(&guest, OUT, 0, &[1; 512], 0).0, 0);
        assert_eq!(server.probe.take_log(), write(through), "{features:#x} {wce:?}");
        assert_eq!(ring.request(&guest, WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, 0);
        let zero = Did::Zero { offset: 0, len: 512, fua: through, unmap: false };
        assert_eq!(server.probe.take_log(), [zero]);
        assert_eq!(ring.request(&guest, DISCARD, 0, &range(0, 1, 0), 0).0, 0);
        let log = server.probe.take_log();
        assert_eq!(log.contains(&Did::Flush), through);
        if wce.is_some() {
            assert!(client.set_wce(1), "while the queue runs");
            assert_eq!(ring.request(&guest, OUT, 0, &[1; 512], 0).0, 0);
            assert_eq!(server.probe.take_log(), write(false));
        }
    }
    let server = Server::start(BlkOptions { writethrough: true, ..writable() });
    let guest = Guest::new();
    let (client, mut ring) = Client::ready(&server.path(), &guest, feature::FLUSH);
    assert_eq!(client.ask(code::GET_FEATURES, &[]).number() & feature::CONFIG_WCE, 0);
    assert_eq!(client.config()[32], 0);
    assert_eq!(ring.request(&guest, OUT, 0, &[1; 512], 0).0, 0);
    assert_eq!(server.probe.take_log(), write(true));
}

#[test]
fn read_only_is_offered_and_kept() {
    let server = Server::start(BlkOptions::default());
    let guest = Guest::new();
    let (client, mut ring) = Client::ready(&server.path(), &guest, feature::RO | feature::FLUSH);
    let offered = client.ask(code::GET_FEATURES, &[]).number();
    assert_eq!(offered & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    assert_eq!(ring.request(&guest, IN, 0, &[], 512), (0, vec![0; 512]));
    assert_eq!(ring.request(&guest, OUT, 0, &[1; 512], 0).0, 1);
    assert_eq!(ring.request(&guest, WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, 1);
    assert_eq!(ring.request(&guest, DISCARD, 0, &range(0, 8, 0), 0).0, 1);
    assert_eq!(server.probe.take_log(), []);
    assert_eq!(ring.request(&guest, FLUSH, 0, &[], 0).0, 0);
}

#[test]
fn larger_blocks_are_kept_to() {
    let options = BlkOptions { logical_block: LogicalBlock::new(4096).unwrap(), ..writable() };
    let server = Server::start(options);
    let guest = Guest::new();
    let (client, mut ring) = Client::ready(&server.path(), &guest, feature::FLUSH);
    assert_eq!(client.config()[20..24], 4096_u32.to_le_bytes());
    assert_eq!(client.capacity(), SIZE as u64 / 512, "always in sectors");
    assert_eq!(ring.request(&guest, OUT, 8, &[1; 4096], 0).0, 0);
    assert_eq!(ring.request(&guest, OUT, 1, &[1; 4096], 0).0, 1);
    assert_eq!(ring.request(&guest, OUT, 8, &[1; 512], 0).0, 1);
}

#[test]
fn chains_come_in_any_shape() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (_client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
    let data = pattern(4096, 5);
    // The header in three parts, the data byte by byte where two regions meet, an empty part, and all of it in a table elsewhere.
    request_pieces(&guest, OUT, 16, &data, 0);
    guest.write(REGION - 2048, &data);
    let part = |at, len, writable| Piece { at, len, writable };
    let pieces = [
        part(HEADER, 4, false),
        part(HEADER + 4, 11, false),
        part(HEADER + 15, 1, false),
        part(0xdead_beef_0000, 0, false),
        part(REGION - 2048, 1, false),
        part(REGION - 2047, 4095, false),
        part(STATUS, 1, true),
    ];
    for indirect in [false, true] {
        guest.write(STATUS, &[0xee]);
        let head =
            if indirect { ring.indirect(&guest, 0x8_0008, &pieces) } else { ring.chain(&guest, &pieces) };
        ring.offer(&guest, head);
        ring.kick();
        assert_eq!(ring.answer(&guest), (head.into(), 1));
        assert_eq!(guest.read(STATUS, 1), [0]);
    }
    assert!(server.contents()[8192..8192 + 4096] == data);
    // Room in parts, with the outcome at the end of the last.
    request_pieces(&guest, IN, 16, &[], 4096);
    let pieces = [part(HEADER, 16, false), part(ROOM, 1000, true), part(ROOM + 1000, 3097, true)];
    let head = ring.indirect(&guest, 0x8_0000, &pieces);
    ring.offer(&guest, head);
    ring.kick();
    assert_eq!(ring.answer(&guest), (head.into(), 4097));
    assert!(guest.read(ROOM, 4096) == data);
    assert_eq!(guest.read(ROOM + 4096, 1), [0]);
}

#[test]
fn queues_run_beside_each_other_and_answers_come_as_they_are_ready() {
    let server = Server::start(writable());
    let guest = Guest::new();
    for features in [feature::FLUSH, USUAL] {
        let (client, mut first) = Client::ready(&server.path(), &guest, features);
        let mut second = Ring::start(&client, &guest, 1, features);
        // The first queue waits for the disk.
        server.probe.hold.store(true, std::sync::atomic::Ordering::SeqCst);
        let pieces = request_pieces(&guest, OUT, 0, &[7; 512], 0);
        let head = first.chain(&guest, &pieces);
        first.offer(&guest, head);
        first.kick();
        let begun = server.probe.begun.load(std::sync::atomic::Ordering::SeqCst);
        server.probe.wait_for(begun.max(1));
        // The second one has its own places for what it needs.
        guest.write(0x20_0000 + DATA, &words(&[IN, 0, 8, 0]));
        let part = |at, len, writable| Piece { at, len, writable };
        let pieces = [
            part(0x20_0000 + DATA, 16, false),
            part(0x21_0000 + DATA, 512, true),
            part(0x22_0000 + DATA, 1, true),
        ];
        let head = second.chain(&guest, &pieces);
        second.offer(&guest, head);
        second.kick();
        assert_eq!(second.answer(&guest), (head.into(), 513));
        assert_eq!(first.published(&guest), first.used, "still waits");
        server.probe.hold.store(false, std::sync::atomic::Ordering::SeqCst);
        first.answer(&guest);
        assert_eq!(guest.read(STATUS, 1), [0]);
    }
}

#[test]
fn many_requests_at_once_are_all_answered_once() {
    let server = Server::start(writable());
    let guest = Guest::new();
    for features in [feature::FLUSH, USUAL] {
        let (_client, mut ring) = Client::ready(&server.path(), &guest, features);
        for round in 0..5_u64 {
            let mut heads = Vec::new();
            for slot in 0..u64::from(QUEUE) / 3 {
                let header = HEADER + slot * 64;
                let data = DATA + slot * 4096;
                let sector = (round * 21 + slot) * 8;
                guest.write(header, &[words(&[OUT, 0]), sector.to_le_bytes().to_vec()].concat());
                guest.write(data, &[(sector / 8) as u8 + 1; 4096]);
                guest.write(header + 32, &[0xee]);
                let part = |at, len, writable| Piece { at, len, writable };
                let pieces = [part(header, 16, false), part(data, 4096, false), part(header + 32, 1, true)];
                let head = ring.chain(&guest, &pieces);
                ring.offer(&guest, head);
                heads.push(u32::from(head));
            }
            ring.kick();
            let mut answered: Vec<u32> = heads.iter().map(|_| ring.answer(&guest).0).collect();
            answered.sort_unstable();
            heads.sort_unstable();
            assert_eq!(answered, heads);
            let outcomes = (0..u64::from(QUEUE) / 3).map(|slot| guest.read(HEADER + slot * 64 + 32, 1)[0]);
            assert!(outcomes.into_iter().all(|outcome| outcome == 0));
        }
        assert_eq!(ring.published(&guest), ring.used);
        let contents = server.contents();
        assert!((0..105_usize).all(|block| contents[block * 4096..][..4096] == [block as u8 + 1; 4096]));
    }
}

#[test]
fn a_driver_that_wants_no_notifications_gets_none() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (_client, mut ring) = Client::ready(&server.path(), &guest, feature::FLUSH);
    // What was said before: of the queue's start, and of this.
    assert_eq!(ring.request(&guest, FLUSH, 0, &[], 0).0, 0);
    while rings(&ring.call, Duration::from_millis(100)) {}
    guest.set_word(ring.places()[1], 1);
    let pieces = request_pieces(&guest, FLUSH, 0, &[], 0);
    let head = ring.chain(&guest, &pieces);
    ring.offer(&guest, head);
    ring.kick();
    wait_until("an answer", || ring.published(&guest) == 2);
    assert!(!rings(&ring.call, Duration::from_millis(100)));
}
