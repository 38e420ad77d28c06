//! Exports that come and go, and disks that change, while clients are connected.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::{Client, SIZE, Server, disk, export};
use crate::protocol::{eventually, read, write};
use crate::tools::run;
use headwater_block::{DiskOptions, ErrorKind};
use headwater_export::Removal;
use headwater_export::nbd::{Export, ServerOptions};
use headwater_nbd::{ClientAsk, Command, CommandFlags, ErrorCode, Request, TransmissionFlags};

impl Server {
    fn add(&self, name: &'static str) -> Result<(), ErrorKind> {
        self.add_as(name, |export| export)
    }

    /// Serves the disk of "disk" under another name.
    fn add_as(
        &self,
        name: &'static str,
        edit: impl FnOnce(Export) -> Export + Send + 'static,
    ) -> Result<(), ErrorKind> {
        self.order(move |owner| async move {
            owner.server().add(edit(export(name, &owner.edge))).map_err(|error| error.kind())
        })
    }

    /// Removes an export; what is received is whether it could be, once it is gone.
    fn remove(&self, name: &'static str, how: Removal) -> std::sync::mpsc::Receiver<Result<(), ErrorKind>> {
        self.begin(move |owner| async move {
            let removed = owner.server().remove(name, how);
            match removed {
                Ok(removed) => {
                    removed.await;
                    Ok(())
                }
                Err(error) => Err(error.kind()),
            }
        })
    }

    fn clients_of(&self, name: &'static str) -> Option<usize> {
        self.order(move |owner| async move { owner.server().clients(name) })
    }

    fn try_client(&self, export: &str) -> Result<Client, String> {
        Client::try_negotiate(self.connect(), ClientAsk::new(export))
    }
}

fn soon<R>(result: &std::sync::mpsc::Receiver<R>) -> R {
    result.recv_timeout(Duration::from_secs(20)).expect("it ends")
}

#[test]
fn exports_come_and_go_and_the_list_shows_those_that_are_there() {
    let server = Server::start();
    let list = || run("nbdinfo", &["--list", "--json", &server.uri("")]);
    assert!(!list().contains("\"later\""));
    assert!(server.try_client("later").unwrap_err().contains("no such export"));
    server.add("later").unwrap();
    assert!(list().contains("\"later\""));
    let mut client = server.try_client("later").unwrap();
    let mut same_disk = server.client();
    assert_eq!(client.ask(write(1, 0, 4096), &[7; 4096]).error, None);
    assert_eq!(same_disk.ask(read(2, 0, 4096), &[]).data, [7; 4096]);
    assert_eq!(server.add("later"), Err(ErrorKind::AlreadyExists));
    drop(client);
    eventually("the client is gone", || server.clients_of("later") == Some(0));
    assert_eq!(soon(&server.remove("later", Removal::Safe)), Ok(()));
    assert!(!list().contains("\"later\""));
    assert_eq!(soon(&server.remove("later", Removal::Safe)), Err(ErrorKind::NotFound));
    assert_eq!(server.clients_of("later"), None);
    assert_eq!(server.add_as("x", |e| Export { name: "x".repeat(5000), ..e }), Err(ErrorKind::InvalidInput));
    assert_eq!(same_disk.ask(read(3, 0, 4096), &[]).data, [7; 4096]);
}

#[test]
fn a_server_without_exports_refuses_all_names() {
    let server = Server::start();
    for name in ["disk", "read-only"] {
        soon(&server.remove(name, Removal::Safe)).unwrap();
    }
    for name in ["", "disk"] {
        assert!(server.try_client(name).unwrap_err().contains("no such export"));
    }
    server.add("").unwrap();
    assert_eq!(server.try_client("").unwrap().offer.size, SIZE);
}

#[test]
fn the_empty_name_means_the_only_export_only_if_that_is_wanted() {
    for empty_name_is_only_export in [true, false] {
        let server =
            Server::start_with(ServerOptions { empty_name_is_only_export, ..ServerOptions::default() });
        assert!(server.try_client("").is_err(), "there are two");
        soon(&server.remove("read-only", Removal::Safe)).unwrap();
        assert_eq!(server.try_client("").is_ok(), empty_name_is_only_export);
    }
}

#[test]
fn safe_removal_is_refused_while_a_client_is_there() {
    let server = Server::start();
    let mut client = server.client();
    let haggling = server.connect();
    assert_eq!(server.clients_of("disk"), Some(1), "who has not chosen yet doesn't count");
    assert_eq!(soon(&server.remove("disk", Removal::Safe)), Err(ErrorKind::InUse));
    assert_eq!(client.ask(read(1, 0, 4096), &[]).error, None);
    drop(client);
    eventually("the client is gone", || server.clients_of("disk") == Some(0));
    assert_eq!(soon(&server.remove("disk", Removal::Safe)), Ok(()));
    let refused = Client::try_negotiate(haggling, ClientAsk::new("disk")).err().unwrap();
    assert!(refused.contains("no such export"), "{refused}");
}

#[test]
fn hard_removal_finishes_requests_and_sends_the_clients_away() {
    let server = Server::start();
    server.add("again").unwrap();
    let (mut busy, mut idle) = (server.client(), server.client());
    let mut other = server.try_client("again").unwrap();
    server.probe.hold(true);
    busy.send(write(1, 0, 4096), &[7; 4096]);
    eventually("the write begins", || server.probe.begun.load(Ordering::SeqCst) == 1);
    let removed = server.remove("disk", Removal::Hard);
    assert!(idle.is_closed());
    assert!(server.try_client("disk").unwrap_err().contains("no such export"));
    // The name is free while the old one has not come to its end.
    server.add("disk").unwrap();
    let mut fresh = server.try_client("disk").unwrap();
    assert!(
        removed.recv_timeout(Duration::from_millis(100)).is_err(),
        "a request is still being carried out"
    );
    server.probe.hold(false);
    assert_eq!(busy.answer(0).error, None);
    assert!(busy.is_closed());
    assert_eq!(soon(&removed), Ok(()));
    for client in [&mut fresh, &mut other] {
        assert_eq!(client.ask(read(2, 0, 4096), &[]).data, [7; 4096]);
    }
}

#[test]
fn a_client_that_takes_no_answer_does_not_hold_a_removal_up_for_ever() {
    let server = Server::start();
    let mut deaf = server.client();
    deaf.ask(write(1, 0, 1 << 20), &vec![7; 1 << 20]);
    for cookie in 0..30 {
        deaf.send(read(cookie, 0, 1 << 20), &[]);
    }
    assert_eq!(soon(&server.remove("disk", Removal::Hard)), Ok(()));
}

#[test]
fn an_export_that_goes_between_two_options_is_gone() {
    let server = Server::start();
    let mut stream = server.connect();
    let mut say = |bytes: &[u8], answer: usize| {
        std::io::Write::write_all(&mut stream, bytes).unwrap();
        let mut reply = vec![0; answer];
        stream.read_exact(&mut reply).unwrap();
        reply
    };
    let option = |code: u32, data: &[u8]| {
        [&b"IHAVEOPT"[..], &code.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
    };
    let go = option(7, b"\0\0\0\x04disk\0\0");
    say(&[0, 0, 0, 3], 18);
    // INFO succeeds, GO does not.
    let info = say(&option(6, b"\0\0\0\x04disk\0\0"), 20 + 12 + 20);
    assert_eq!(info[12..16], 3_u32.to_be_bytes());
    soon(&server.remove("disk", Removal::Hard)).unwrap();
    let refused = say(&go, 20 + "no such export".len());
    assert_eq!(refused[12..16], (1_u32 << 31 | 6).to_be_bytes());
    // Another one of that name is as good.
    server.add("disk").unwrap();
    let info = say(&go, 20 + 12 + 20);
    assert_eq!(info[12..16], 3_u32.to_be_bytes());
}

#[test]
fn one_disk_has_several_names_and_rights() {
    let server = Server::start();
    server.add_as("look", |export| Export { writable: false, ..export }).unwrap();
    server.add_as("plain", |export| Export { allocation_depth: false, ..export }).unwrap();
    let mut writer = server.client();
    let mut reader = server.try_client("look").unwrap();
    assert!(reader.offer.flags.contains(TransmissionFlags::READ_ONLY));
    assert!(!writer.offer.flags.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(reader.ask(write(1, 0, 4), b"data").error, Some(ErrorCode::Permission));
    assert_eq!(writer.ask(write(2, 0, 4096), &[7; 4096]).error, None);
    assert_eq!(reader.ask(read(3, 0, 4096), &[]).data, [7; 4096]);
    let contexts = |name: &str| run("nbdinfo", &[&server.uri(name)]);
    assert!(contexts("look").contains("qemu:allocation-depth"));
    let plain = contexts("plain");
    assert!(plain.contains("base:allocation") && !plain.contains("qemu:allocation-depth"), "{plain}");
}

#[test]
fn the_disk_is_exchanged_below_a_client_that_verifies() {
    let server = Server::start();
    let worker = {
        let mut client = server.client();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // Each block holds the number of its last write. Sixteen requests at a time.
            let mut written = [0_u8; 16];
            let mut rounds = 0_u64;
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                rounds += 1;
                for block in 0..16_u64 {
                    let value = (rounds % 251 + 1) as u8;
                    client.send(write(block, block * 4096, 4096), &[value; 4096]);
                    written[block as usize] = value;
                }
                for _ in 0..16 {
                    assert_eq!(client.answer(0).error, None);
                }
                for block in 0..16_u64 {
                    client.send(read(block, block * 4096, 4096), &[]);
                }
                for _ in 0..16 {
                    let answer = client.answer(0);
                    assert_eq!(answer.data, [written[answer.cookie as usize]; 4096]);
                }
            }
            rounds
        });
        (stop, thread)
    };
    // As a snapshot does, but with a copy: drain, copy what is there, lead to the copy.
    for _ in 0..200 {
        server.order(|owner| async move {
            let drained = owner.edge.drain().await;
            let old = owner.edge.disk();
            let new = disk(SIZE, Arc::default());
            let bytes = old.read(0, 16 * 4096).await.unwrap();
            new.write(0, bytes, Default::default()).await.unwrap();
            // Whoever goes to the old one finds something else.
            old.discard(0, 16 * 4096).await.unwrap();
            owner.edge.replace(&drained, new);
        });
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(worker.0);
    let rounds = worker.1.join().unwrap();
    assert!(rounds > 20, "the client got on: {rounds}");
}

#[test]
fn who_is_connected_keeps_the_size_that_it_was_told() {
    let server = Server::start();
    let mut early = server.client();
    let resize = |size: u64| {
        server.order(move |owner| async move { owner.edge.disk().resize(size).await.unwrap() });
    };
    resize(SIZE + 4096);
    assert_eq!(early.ask(write(1, SIZE, 512), &[7; 512]).error, Some(ErrorCode::NoSpace));
    let mut late = server.client();
    assert_eq!(late.offer.size, SIZE + 4096);
    assert_eq!(late.ask(write(2, SIZE, 512), &[7; 512]).error, None);
    resize(1 << 20);
    let status = Request::new(Command::BlockStatus, 9, (1 << 20) - 4096, 8192);
    for client in [&mut early, &mut late] {
        assert_eq!(client.ask(write(3, 1 << 20, 512), &[7; 512]).error, Some(ErrorCode::NoSpace));
        assert_eq!(client.ask(read(4, (1 << 20) - 256, 512), &[]).error, Some(ErrorCode::Invalid));
        assert_eq!(client.ask(status, &[]).error, Some(ErrorCode::Invalid));
        assert_eq!(client.ask(read(5, (1 << 20) - 512, 512), &[]).error, None);
    }
    assert_eq!(server.client().offer.size, 1 << 20);
}

#[test]
fn a_disk_that_grows_does_not_grow_for_clients() {
    let server = Server::start();
    server.order(|owner| async move {
        let disk = owner.edge.disk();
        disk.set_options(DiskOptions { growable: true, ..disk.options() });
    });
    let mut client = server.client();
    assert_eq!(client.ask(write(1, SIZE - 256, 512), &[7; 512]).error, Some(ErrorCode::NoSpace));
    assert_eq!(client.ask(read(2, SIZE, 1), &[]).error, Some(ErrorCode::Invalid));
    let zero = Request::new(Command::WriteZeroes, 3, SIZE, 4096);
    assert_eq!(client.ask(zero, &[]).error, Some(ErrorCode::NoSpace));
    // It may be shorter by now than the client was told; such a disk reads as zeroes there, and has a status.
    server.order(|owner| async move { owner.edge.disk().resize(1 << 20).await.unwrap() });
    let answer = client.ask(read(4, 2 << 20, 4096), &[]);
    assert_eq!(answer.error, None);
    let status = Request::new(Command::BlockStatus, 5, (1 << 20) - 4096, 1 << 20);
    let answer = client.ask(status.with_flags(CommandFlags::NONE), &[]);
    assert!(answer.error.is_some() || !answer.status.is_empty());
}

#[test]
fn clients_beyond_the_most_wait_for_a_place() {
    let server = Server::start_with(ServerOptions { max_connections: 2, ..ServerOptions::default() });
    let (first, _second) = (server.client(), server.client());
    assert!(first.offer.flags.contains(TransmissionFlags::CAN_MULTI_CONN));
    let mut third = server.connect();
    third.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(third.read(&mut [0; 18]).is_err(), "no greeting yet");
    drop(first);
    third.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut third = Client::negotiate(third, ClientAsk::new("disk"));
    assert_eq!(third.ask(read(1, 0, 4096), &[]).error, None);

    let alone = Server::start_with(ServerOptions { max_connections: 1, ..ServerOptions::default() });
    assert!(!alone.client().offer.flags.contains(TransmissionFlags::CAN_MULTI_CONN));
    let many = Server::start_with(ServerOptions { max_connections: 0, ..ServerOptions::default() });
    let clients: Vec<Client> = (0..150).map(|_| many.client()).collect();
    assert_eq!(many.clients_of("disk"), Some(clients.len()));
}

#[test]
fn a_client_that_does_not_get_on_with_negotiating_is_cut_off() {
    let limit = Some(Duration::from_millis(100));
    let server = Server::start_with(ServerOptions { handshake_limit: limit, ..ServerOptions::default() });
    let mut client = server.client();
    let mut slow: UnixStream = server.connect();
    let mut greeting = Vec::new();
    assert_eq!(slow.read_to_end(&mut greeting).unwrap(), 18, "the greeting, and the end");
    assert_eq!(client.ask(read(1, 0, 4096), &[]).error, None, "the limit is one for negotiation");
}
