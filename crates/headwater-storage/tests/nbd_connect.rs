//! How the NBD client gets to its server, and back to it.

mod support;

use headwater_block::{Buffer, ErrorKind, Node, WriteFlags, ZeroFlags};
use headwater_nbd::IpFamily;
use headwater_storage::nbd::{NbdNode, NbdOptions, Server as Address};
use std::cell::Cell;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net as unix;
use std::rc::Rc;
use std::time::Duration;
use support::{Server, pattern, read, run};
use tokio::time::Instant;

#[test]
fn a_server_is_reached_by_its_parts() {
    run(async {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let port_text = port.to_string();
        let _tcp = Server::nbdkit(&["-p", &port_text, "-i", "127.0.0.1", "pattern", "64M"]);
        let inet = |family| Address::Inet { host: "127.0.0.1".into(), port, family };
        let node = NbdNode::open(inet(IpFamily::V4), "", NbdOptions::default()).await.unwrap();
        assert_eq!(node.name(), format!("nbd://127.0.0.1:{port}/"));
        assert_eq!(read(&*node, 8, 4096).await.unwrap(), pattern(8, 4096));
        let refused = NbdNode::open(inet(IpFamily::V6), "", NbdOptions::default()).await.err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");

        let server = Server::nbdkit(&["pattern", "64M"]);
        let path = server.socket();
        let node = NbdNode::open(Address::Unix { path }, "a name", NbdOptions::default()).await.unwrap();
        assert!(node.name().starts_with("nbd+unix:///a%20name?socket=/"), "{}", node.name());
        assert_eq!(read(&*node, 8, 4096).await.unwrap(), pattern(8, 4096));
    });
}

/// Hands what comes to an abstract socket on to `server`.
fn forward(listener: unix::UnixListener, server: &Server) {
    listener.set_nonblocking(true).unwrap();
    let (listener, path) = (tokio::net::UnixListener::from_std(listener).unwrap(), server.socket());
    tokio::task::spawn_local(async move {
        while let Ok((mut here, _)) = listener.accept().await {
            let mut there = tokio::net::UnixStream::connect(&path).await.unwrap();
            tokio::task::spawn_local(async move {
                let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
            });
        }
    });
}

#[test]
fn abstract_sockets_are_reached_with_both_kinds_of_names() {
    run(async {
        let server = Server::nbdkit(&["pattern", "64M"]);
        for tight in [true, false] {
            let name = format!("headwater-client-{}-{tight}", std::process::id()).into_bytes();
            let mut wire_name = name.clone();
            if !tight {
                wire_name.resize(107, 0);
            }
            let address = unix::SocketAddr::from_abstract_name(wire_name).unwrap();
            forward(unix::UnixListener::bind_addr(&address).unwrap(), &server);
            let address = Address::Abstract { name: name.clone(), tight };
            let node = NbdNode::open(address, "", NbdOptions::default()).await.unwrap();
            assert_eq!(read(&*node, 8, 4096).await.unwrap(), pattern(8, 4096));
            let other = Address::Abstract { name, tight: !tight };
            assert!(NbdNode::open(other, "", NbdOptions::default()).await.is_err());
        }
    });
}

#[test]
fn a_descriptor_makes_one_connection_and_no_other() {
    run(async {
        let mut server = Server::nbdkit(&["pattern", "64M"]);
        let stream = unix::UnixStream::connect(server.socket()).unwrap();
        let options = NbdOptions {
            retry: Duration::ZERO,
            open_timeout: Duration::from_secs(20),
            ..NbdOptions::default()
        };
        let node = NbdNode::open(Address::Fd(stream.into()), "", options.clone()).await.unwrap();
        assert!(read(&*node, 8, 20 << 20).await.unwrap() == pattern(8, 20 << 20));
        server.restart_nbdkit(&["pattern", "64M"]);
        for _ in 0..3 {
            let error = read(&*node, 0, 512).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        }
        // Neither is one that leads nowhere tried twice.
        let (here, there) = unix::UnixStream::pair().unwrap();
        drop(there);
        let start = Instant::now();
        NbdNode::open(Address::Fd(here.into()), "", options.clone()).await.err().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        NbdNode::open(Address::Fd(file.into()), "", options).await.err().unwrap();
        assert!(start.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn opening_waits_for_a_server_if_it_may() {
    run(async {
        let mut server = Server::nbdkit(&["pattern", "64M"]);
        server.stop();
        let path = server.socket();
        let open = |seconds| {
            let options =
                NbdOptions { open_timeout: Duration::from_secs_f32(seconds), ..NbdOptions::default() };
            NbdNode::open(Address::Unix { path: path.clone() }, "", options)
        };
        let start = Instant::now();
        assert!(open(0.0).await.is_err());
        assert!(start.elapsed() < Duration::from_millis(200));
        let start = Instant::now();
        assert!(open(0.6).await.is_err());
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(200) && took < Duration::from_secs(3), "{took:?}");
        let (opened, ()) = tokio::join!(open(20.0), async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            server.restart_nbdkit(&["pattern", "64M"]);
        });
        assert_eq!(read(&*opened.unwrap(), 0, 512).await.unwrap(), pattern(0, 512));
    });
}

#[test]
fn when_the_time_to_reconnect_is_over_requests_fail_at_once_until_there_is_a_connection() {
    run(async {
        let mut server = Server::nbdkit(&["pattern", "64M"]);
        let options = NbdOptions { retry: Duration::from_millis(400), ..NbdOptions::default() };
        let node = NbdNode::connect(&server.uri(), options).await.unwrap();
        read(&*node, 0, 512).await.unwrap();
        server.stop();
        assert!(read(&*node, 0, 512).await.is_err());
        let start = Instant::now();
        for at in 1..20 {
            assert_eq!(read(&*node, at * 4096, 512).await.unwrap_err().kind(), ErrorKind::Unavailable);
        }
        assert!(start.elapsed() < Duration::from_millis(400), "they don't wait one after the other");
        server.restart_nbdkit(&["pattern", "64M"]);
        let mut tries = 0;
        while read(&*node, 0, 512).await.is_err() {
            tries += 1;
            assert!(tries < 100, "it comes back by itself");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}

#[test]
fn changes_are_repeated_for_those_who_want_it() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image.raw");
        std::fs::write(&image, vec![0; 16 << 20]).unwrap();
        let arguments = ["file", image.to_str().unwrap()];
        let mut server = Server::nbdkit(&arguments);
        let options =
            NbdOptions { retry: Duration::from_secs(20), repeat_changes: true, ..NbdOptions::default() };
        let node = NbdNode::connect(&server.uri(), options).await.unwrap();
        for round in 0..5_u8 {
            let writes = (0..64_u64).map(|i| {
                let node = &node;
                async move {
                    let data = Buffer::copy_of(&[round + 1; 65536]);
                    node.write(i * 65536, data, WriteFlags::default()).await
                }
            });
            let writes = futures_util::future::join_all(writes);
            let (written, zeroed, flushed, ()) = tokio::join!(
                writes,
                node.write_zeroes(8 << 20, 1 << 20, ZeroFlags::default()),
                node.flush(),
                async {
                    tokio::time::sleep(Duration::from_micros(u64::from(round) * 700)).await;
                    server.restart_nbdkit(&arguments);
                }
            );
            assert!(written.into_iter().all(|written| written.is_ok()));
            zeroed.unwrap();
            flushed.unwrap();
            assert_eq!(read(&*node, 63 * 65536, 65536).await.unwrap(), [round + 1; 65536]);
        }
        node.flush().await.unwrap();
        assert!(std::fs::read(&image).unwrap()[..4 << 20] == vec![5; 4 << 20]);
        // Without a server they fail all the same, when the time is over.
        let options =
            NbdOptions { retry: Duration::from_millis(200), repeat_changes: true, ..Default::default() };
        let node = NbdNode::connect(&server.uri(), options).await.unwrap();
        server.stop();
        let data = Buffer::copy_of(&[1; 512]);
        assert_eq!(
            node.write(0, data, WriteFlags::default()).await.unwrap_err().kind(),
            ErrorKind::Unavailable
        );
    });
}

/// A way to `server` over TCP that takes `delay` for each connection and lets `most` pass: where it begins, and how many have come.
async fn far(server: &Server, delay: Duration, most: usize) -> (u16, Rc<Cell<usize>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (path, come) = (server.socket(), Rc::new(Cell::new(0)));
    let count = come.clone();
    tokio::task::spawn_local(async move {
        while let Ok((mut here, _)) = listener.accept().await {
            count.set(count.get() + 1);
            if count.get() > most {
                continue;
            }
            let path = path.clone();
            tokio::task::spawn_local(async move {
                tokio::time::sleep(delay).await;
                let mut there = tokio::net::UnixStream::connect(&path).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut here, &mut there).await;
            });
        }
    });
    (port, come)
}

#[test]
fn connections_to_a_far_server_are_opened_at_once_when_they_are_expected_or_needed() {
    run(async {
        let server = Server::nbdkit(&["pattern", "64M"]);
        let away = Duration::from_millis(300);
        // What the reads of a job would open, one after the other, is opened at once; and of a server that refuses, what it has is used.
        for (most, expected) in [(usize::MAX, true), (usize::MAX, false), (1, true)] {
            let (port, come) = far(&server, away, most).await;
            let uri = format!("nbd://127.0.0.1:{port}");
            let node = NbdNode::connect(&uri, NbdOptions::default()).await.unwrap();
            assert_eq!(come.get(), 1, "nobody expects anything");
            let reads = futures_util::future::join_all((0..8).map(|n| read(&*node, n << 20, 1 << 20)));
            if expected {
                node.expect(0..0);
                tokio::time::sleep(away / 2).await;
                assert_eq!(come.get(), 4, "before the second is ready");
            }
            for (n, data) in (0..8).zip(reads.await) {
                assert_eq!(data.unwrap(), pattern(n << 20, 1 << 20));
            }
            let all = async {
                while come.get() < 4 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(5), all).await.expect("four connections");
            node.close().await.unwrap();
        }
    });
}
