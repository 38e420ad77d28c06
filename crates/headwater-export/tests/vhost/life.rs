//! How work goes on: after a restart, a kill, a change of the disk, a change of memory, the end of the export.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

use headwater_block::ErrorKind;
use headwater_export::Removal;

use crate::server::*;
use headwater_front_end::protocol::*;
use headwater_front_end::*;

const IN: u32 = 0;
const OUT: u32 = 1;

const USUAL: u64 = feature::FLUSH | feature::INDIRECT | feature::EVENT_IDX | feature::CONFIG_WCE;

/// Offers a write of one sector that nobody else's memory is used for.
fn offer_write(guest: &Guest, ring: &mut Ring, slot: u64, sector: u64, byte: u8) -> u16 {
    let header = HEADER + slot * 64;
    let data = DATA + slot * 512;
    guest.write(header, &[words(&[OUT, 0]), sector.to_le_bytes().to_vec()].concat());
    guest.write(data, &[byte; 512]);
    guest.write(header + 32, &[0xee]);
    let part = |at, len, writable| Piece { at, len, writable };
    let head =
        ring.chain(guest, &[part(header, 16, false), part(data, 512, false), part(header + 32, 1, true)]);
    ring.offer(guest, head);
    head
}

fn outcome(guest: &Guest, slot: u64) -> u8 {
    guest.read(HEADER + slot * 64 + 32, 1)[0]
}

/// A record of requests in flight, as the front end keeps it.
struct Kept {
    told: Vec<u8>,
    fd: OwnedFd,
}

impl Kept {
    fn get(client: &Client) -> Self {
        let mut body = longs(&[0, 0]);
        body.extend(1u16.to_le_bytes());
        body.extend(QUEUE.to_le_bytes());
        body.extend([0; 4]);
        let mut reply = client.ask(code::GET_INFLIGHT_FD, &body);
        Self { told: reply.body, fd: reply.fds.remove(0) }
    }

    fn set(&self, client: &Client) {
        assert!(client.tell(code::SET_INFLIGHT_FD, &self.told, &[self.fd.as_fd()]));
    }
}

#[test]
fn a_queue_that_comes_to_rest_has_answered_what_it_took() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
    server.probe.hold.store(true, Ordering::SeqCst);
    for slot in 0..3 {
        offer_write(&guest, &mut ring, slot, slot, slot as u8 + 1);
    }
    ring.kick();
    server.probe.wait_for(3);
    client.send(code::GET_VRING_BASE, &words(&[0, 0]), &[], false);
    std::thread::sleep(Duration::from_millis(50));
    server.probe.hold.store(false, Ordering::SeqCst);
    let base = client.receive(code::GET_VRING_BASE).unwrap().body;
    assert_eq!(base, words(&[0, 3]));
    assert_eq!(ring.published(&guest), 3);
    // Nothing moves while it rests, and what came meanwhile is done when it goes on, without another kick.
    let head = offer_write(&guest, &mut ring, 3, 3, 9);
    ring.kick();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(ring.published(&guest), 3);
    ring.attach(&client, 3);
    for _ in 0..3 {
        ring.answer(&guest);
    }
    assert_eq!(ring.answer(&guest).0, u32::from(head));
    assert_eq!(outcome(&guest, 3), 0);
}

#[test]
fn after_a_kill_what_was_taken_is_done_again_once() {
    let mut server = Server::start(writable());
    let guest = Guest::new();
    let features = USUAL | feature::PROTOCOL | feature::VERSION_1;
    let client = Client::connect(&server.path());
    client.negotiate(features);
    client.share(&guest);
    let kept = Kept::get(&client);
    kept.set(&client);
    let mut ring = Ring::start(&client, &guest, 0, features);
    let mut client = client;
    assert!(client.set_wce(0));
    let mut number = 0;
    for round in 0..4_u64 {
        // Some that are answered, some that are taken when the end comes, and some that nobody has looked at.
        for slot in 0..3 {
            number += 1;
            offer_write(&guest, &mut ring, slot, number, number as u8);
        }
        ring.kick();
        for _ in 0..3 {
            ring.answer(&guest);
        }
        server.probe.hold.store(true, Ordering::SeqCst);
        let begun = server.probe.begun.load(Ordering::SeqCst);
        let first = number + 1;
        let mut heads = Vec::new();
        for slot in 3..6 {
            number += 1;
            heads.push(offer_write(&guest, &mut ring, slot, number, number as u8));
        }
        ring.kick();
        server.probe.wait_for(begun + 3);
        let before = ring.published(&guest);
        server = server.kill_and_restart(writable());
        assert!(client.is_cut_off());
        assert_eq!(ring.published(&guest), before);
        number += 1;
        heads.push(offer_write(&guest, &mut ring, 6, number, number as u8));
        client = Client::connect(&server.path());
        client.negotiate(features);
        client.share(&guest);
        kept.set(&client);
        // The front end knows no better than what was answered.
        ring.attach(&client, before);
        let mut answered: Vec<u16> = heads.iter().map(|_| ring.answer(&guest).0 as u16).collect();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(ring.published(&guest), before.wrapping_add(4), "nothing twice");
        answered.sort_unstable();
        heads.sort_unstable();
        assert_eq!(answered, heads, "round {round}");
        assert!((0..7).all(|slot| outcome(&guest, slot) == 0));
        // In their order, and as durably as the guest had chosen before.
        let write = |sector: u64| Did::Write { offset: sector * 512, len: 512, fua: true };
        let log = server.probe.take_log();
        assert_eq!(log, (first..=number).map(write).collect::<Vec<_>>());
    }
    let contents = server.contents();
    assert!((1..=number).all(|sector| contents[sector as usize * 512..][..512] == [sector as u8; 512]));
}

#[test]
fn the_next_client_is_let_in_when_the_work_of_the_last_is_done() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
    server.probe.hold.store(true, Ordering::SeqCst);
    offer_write(&guest, &mut ring, 0, 0, 5);
    ring.kick();
    server.probe.wait_for(1);
    drop(client);
    let next = Client::connect(&server.path());
    next.socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    next.send(code::GET_FEATURES, &[], &[], false);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(ring.published(&guest), 0);
    next.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    server.probe.hold.store(false, Ordering::SeqCst);
    assert!(next.receive(code::GET_FEATURES).is_some());
    assert_eq!(ring.published(&guest), 1, "the answer was there before");
}

#[test]
fn a_disk_that_changes_its_size_is_told_of() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(client.tell(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
    drop(theirs);
    let end = SIZE as u64 / 512;
    assert_eq!(ring.request(&guest, IN, end, &[], 512).0, 1);
    server.order(move |owner| async move {
        owner.edge.disk().resize(2 * SIZE as u64).await.unwrap();
        let export = owner.export.borrow();
        export.as_ref().unwrap().look_at_size();
        export.as_ref().unwrap().look_at_size();
    });
    let channel = Client { socket: ours };
    channel.socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut message = [0; 12];
    std::io::Read::read_exact(&mut &channel.socket, &mut message).unwrap();
    assert_eq!(message[..], words(&[2, 1, 0]), "the configuration has changed; no reply is wanted");
    channel.socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(std::io::Read::read(&mut &channel.socket, &mut message).is_err(), "once");
    assert_eq!(client.capacity(), 2 * end);
    assert_eq!(ring.request(&guest, IN, end, &[], 512).0, 0);
}

#[test]
fn memory_comes_and_goes_while_queues_run() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let client = Client::connect(&server.path());
    client.negotiate(USUAL | feature::PROTOCOL | feature::VERSION_1);
    let region = |index: u64| longs(&[0, index * REGION, REGION, USER + index * REGION, index * REGION]);
    assert!(client.tell(code::ADD_MEM_REG, &region(0), &[guest.file.as_fd()]));
    let mut ring = Ring::start(&client, &guest, 0, USUAL);
    assert_eq!(ring.request(&guest, IN, 0, &[], 512).0, 0);
    assert!(client.tell(code::ADD_MEM_REG, &region(1), &[guest.file.as_fd()]));
    assert_eq!(ring.request(&guest, IN, 0, &[], 2 << 20).0, 0, "across both");
    assert!(client.tell(code::REM_MEM_REG, &region(1), &[]));
    assert_eq!(ring.request(&guest, IN, 0, &[], 512).0, 0);
    assert!(client.tell(code::ADD_MEM_REG, &region(1), &[guest.file.as_fd()]));
    client.share(&guest);
    assert_eq!(ring.request(&guest, IN, 0, &[], 2 << 20).0, 0);
}

#[test]
fn a_drained_disk_holds_requests_back() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (_client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
    let (sender, receiver) = std::sync::mpsc::channel();
    server.order(move |owner| async move {
        let drained = owner.edge.drain().await;
        tokio::task::spawn_local(async move {
            while receiver.try_recv().is_err() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            drop(drained);
        });
    });
    offer_write(&guest, &mut ring, 0, 0, 5);
    ring.kick();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((ring.published(&guest), server.probe.begun.load(Ordering::SeqCst)), (0, 0));
    sender.send(()).unwrap();
    ring.answer(&guest);
    assert_eq!(outcome(&guest, 0), 0);
}

#[test]
fn an_export_goes_safely_without_clients_and_hard_with_them() {
    let server = Server::start(writable());
    let guest = Guest::new();
    let (client, mut ring) = Client::ready(&server.path(), &guest, USUAL);
    server.probe.hold.store(true, Ordering::SeqCst);
    offer_write(&guest, &mut ring, 0, 0, 5);
    ring.kick();
    server.probe.wait_for(1);
    let (done, over) = std::sync::mpsc::channel();
    server.order(|owner| async move {
        let export = owner.export.borrow_mut().take().unwrap();
        assert_eq!(export.clients(), 1);
        let refused = export.remove(Removal::Safe).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        tokio::task::spawn_local(async move {
            export.remove(Removal::Hard).unwrap().await;
            done.send(()).unwrap();
        });
    });
    assert!(client.is_cut_off());
    assert_eq!(ring.published(&guest), 0);
    server.probe.hold.store(false, Ordering::SeqCst);
    over.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(ring.published(&guest), 1, "what was taken is answered");
    assert!(!server.path().exists());
}
