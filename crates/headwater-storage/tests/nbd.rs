//! The NBD client against nbdkit and qemu-nbd.

mod support;

use futures_util::future::join_all;
use headwater_block::{Buffer, ErrorKind, Extent, ExtentKind, Node, Resolved, WriteFlags, ZeroFlags};
use headwater_storage::nbd::{NbdNode, NbdOptions};
use std::time::Duration;
use support::{Server, pattern, read, run};

const MIB: u64 = 1 << 20;

async fn connect(server: &Server, options: NbdOptions) -> std::rc::Rc<NbdNode> {
    NbdNode::connect(&server.uri(), options).await.unwrap()
}

#[test]
fn reads_of_any_alignment_give_what_the_server_holds() {
    run(async {
        let server = Server::nbdkit(&["pattern", "64M"]);
        let node = connect(&server, NbdOptions::default()).await;
        assert_eq!((node.size(), node.driver(), node.is_read_only()), (64 * MIB, "nbd", true));
        assert!(node.limits().remote && node.limits().depth == 64, "{:?}", node.limits());
        let reads = (0..200_u64).map(|i| {
            let (offset, len) = (i * 317_003 % (63 * MIB), (i * 7919 % 70_000) as usize);
            let node = &node;
            async move { assert_eq!(read(&**node, offset, len).await.unwrap(), pattern(offset, len)) }
        });
        join_all(reads).await;
        let mut expected = pattern(64 * MIB - 10, 10);
        expected.resize(100, 0);
        assert_eq!(read(&*node, 64 * MIB - 10, 100).await.unwrap(), expected);
        assert_eq!(read(&*node, 65 * MIB, 8).await.unwrap(), [0; 8]);
        node.close().await.unwrap();
        assert_eq!(read(&*node, 0, 8).await.unwrap_err().kind(), ErrorKind::Closed);
    });
}

#[test]
fn a_read_longer_than_the_servers_maximum_is_split() {
    run(async {
        let policy = ["blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=128K"];
        let args =
            [&["--filter=blocksize-policy", "pattern", "16M", "blocksize-error-policy=error"], &policy[..]];
        let server = Server::nbdkit(&args.concat());
        let node = connect(&server, NbdOptions::default()).await;
        assert_eq!(node.limits().write_alignment, 4096);
        assert_eq!(node.limits().preferred, 64 << 10);
        for (offset, len) in [(0, 16 << 20), (1, 300_000), (4095, 2), (16 * MIB - 5000, 5000)] {
            assert_eq!(read(&*node, offset, len).await.unwrap(), pattern(offset, len), "{offset} {len}");
        }
    });
}

#[test]
fn holes_are_told_and_not_fetched() {
    run(async {
        // 2 TiB with data in two places; reads cost 50 ms, so that a walk over it by reading would not end.
        let server = Server::nbdkit(&[
            "--filter=delay",
            "data",
            "data= @0x100000 ( 1 2 3 ) @0x10000000000 ( 4 5 6 )",
            "size=2T",
            "rdelay=50ms",
        ]);
        let node = connect(&server, NbdOptions::default()).await;
        let (mut at, mut found) = (0, Vec::new());
        while at < node.size() {
            let extent = node.status(at..node.size()).await.unwrap();
            assert_eq!(extent.offset, at);
            found.push((extent.kind, extent.offset));
            at = extent.end();
        }
        found.dedup_by_key(|(kind, _)| *kind);
        let expected = [
            (ExtentKind::Zero, 0),
            (ExtentKind::Data, MIB),
            (ExtentKind::Zero, MIB + 32768),
            (ExtentKind::Data, 1 << 40),
            (ExtentKind::Zero, (1 << 40) + 32768),
        ];
        assert_eq!(found, expected);
        // What is known is answered from memory, clipped to the question; what follows the end is zero, too.
        assert!(matches!(node.resolve(0..512), Resolved::Zero { len: 512, depth: 0 }));
        assert!(matches!(node.resolve(MIB..MIB + 512), Resolved::At { offset: MIB, len: 512, .. }));
        let start = tokio::time::Instant::now();
        assert_eq!(read(&*node, 8 * MIB, 1 << 20).await.unwrap(), vec![0; 1 << 20]);
        assert!(start.elapsed() < Duration::from_millis(40), "a hole was fetched");
        let end = node.size();
        assert_eq!(
            node.status(end - 4096..end + 4096).await.unwrap(),
            Extent::new(end - 4096, 8192, ExtentKind::Zero)
        );
        assert_eq!(node.status(end..end + 1).await.unwrap().kind, ExtentKind::Zero);
        assert_eq!(read(&*node, 1 << 40, 4).await.unwrap(), [4, 5, 6, 0]);
    });
}

#[test]
fn those_who_ask_for_the_same_status_share_a_request_and_may_leave() {
    run(async {
        let log = tempfile::NamedTempFile::new().unwrap();
        let logfile = format!("logfile={}", log.path().display());
        let server = Server::nbdkit(&[
            "--filter=log",
            "--filter=delay",
            "memory",
            "1G",
            &logfile,
            "delay-extents=50ms",
        ]);
        let node = connect(&server, NbdOptions::default()).await;
        let dropped = tokio::time::timeout(Duration::from_millis(5), node.status(0..4096)).await;
        assert!(dropped.is_err(), "the server was to be slow");
        let all = join_all((0..50).map(|i| node.status(i * 4096..i * 4096 + 4096))).await;
        assert!(all.iter().all(|extent| extent.as_ref().unwrap().kind == ExtentKind::Zero));
        let asked = std::fs::read_to_string(log.path()).unwrap().matches(" Extents ").count();
        assert_eq!(asked, 1);
    });
}

#[test]
fn a_server_without_structured_replies_works_and_has_no_holes() {
    run(async {
        let server = Server::nbdkit(&["--no-sr", "pattern", "8M"]);
        let node = connect(&server, NbdOptions::default()).await;
        assert_eq!(node.status(0..8 * MIB).await.unwrap().kind, ExtentKind::Data);
        assert_eq!(read(&*node, 12345, 3 << 20).await.unwrap(), pattern(12345, 3 << 20));
    });
}

#[test]
fn a_dropped_read_harms_nobody() {
    run(async {
        let server = Server::nbdkit(&["--filter=delay", "pattern", "64M", "rdelay=20ms"]);
        let node = connect(&server, NbdOptions { connections: Some(1), ..NbdOptions::default() }).await;
        for i in 0..8_u64 {
            let dropped =
                tokio::time::timeout(Duration::from_millis(i * 4), read(&*node, i * MIB, 1 << 20)).await;
            assert!(dropped.is_err() || i > 5);
            assert_eq!(read(&*node, i, 1000).await.unwrap(), pattern(i, 1000));
        }
    });
}

#[test]
fn writes_zeroes_trims_and_flushes_arrive() {
    run(async {
        let server = Server::nbdkit(&["memory", "64M"]);
        let node = connect(&server, NbdOptions::default()).await;
        assert!(!node.is_read_only());
        assert_eq!(node.status(0..64 * MIB).await.unwrap().kind, ExtentKind::Zero);
        let data = pattern(MIB, 40 << 20);
        node.write(MIB, Buffer::copy_of(&data), WriteFlags::default()).await.unwrap();
        node.write(0, Buffer::copy_of(b"abc"), WriteFlags { fua: true, ..WriteFlags::default() })
            .await
            .unwrap();
        assert_eq!(
            node.status(MIB..2 * MIB).await.unwrap().kind,
            ExtentKind::Data,
            "own writes are forgotten zeroes"
        );
        assert_eq!(read(&*node, MIB, 40 << 20).await.unwrap(), data);
        node.write_zeroes(2 * MIB, MIB, ZeroFlags { unmap: true, fua: true, fast_only: false })
            .await
            .unwrap();
        node.discard(3 * MIB + 1, MIB).await.unwrap();
        node.flush().await.unwrap();
        assert_eq!(read(&*node, 2 * MIB, 1 << 20).await.unwrap(), vec![0; 1 << 20]);
        assert_eq!(read(&*node, 0, 4).await.unwrap(), b"abc\0");
        let past = node.write(64 * MIB - 1, Buffer::copy_of(b"ab"), WriteFlags::default()).await.unwrap_err();
        assert_eq!(past.kind(), ErrorKind::NoSpace, "{past}");
        assert_eq!(node.resize(MIB).await.unwrap_err().kind(), ErrorKind::Unsupported);
        let reader = connect(&server, NbdOptions { read_only: true, ..NbdOptions::default() }).await;
        let refused = reader.write(0, Buffer::copy_of(b"x"), WriteFlags::default()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
        node.close().await.unwrap();
    });
}

#[test]
fn zeroes_are_sent_as_data_where_the_server_knows_nothing_better() {
    run(async {
        let server = Server::nbdkit(&["--filter=nozero", "memory", "8M"]);
        let node = connect(&server, NbdOptions::default()).await;
        node.write(0, Buffer::copy_of(&vec![7; 4 << 20]), WriteFlags::default()).await.unwrap();
        let fast = ZeroFlags { fast_only: true, ..ZeroFlags::default() };
        assert_eq!(node.write_zeroes(0, MIB, fast).await.unwrap_err().kind(), ErrorKind::Unsupported);
        node.write_zeroes(MIB, 2 * MIB + 512, ZeroFlags { fua: true, ..ZeroFlags::default() }).await.unwrap();
        assert_eq!(read(&*node, MIB, (2 << 20) + 512).await.unwrap(), vec![0; (2 << 20) + 512]);
        assert_eq!(read(&*node, 3 * MIB + 512, 1).await.unwrap(), [7]);
    });
}

#[test]
fn a_refused_request_leaves_the_connection_alone() {
    run(async {
        let switch = tempfile::NamedTempFile::new().unwrap();
        let file = format!("error-file={}", switch.path().display());
        let server = Server::nbdkit(&[
            "--filter=error",
            "pattern",
            "8M",
            "error-pread=EIO",
            "error-pread-rate=1",
            &file,
        ]);
        let node = connect(&server, NbdOptions::default()).await;
        let failed = read(&*node, 4096, 512).await.unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::Io);
        let text = failed.to_string();
        assert!(
            text.contains("read of 512 bytes at 4096 of nbd+unix://") && text.contains("NBD_EIO"),
            "{text}"
        );
        switch.close().unwrap();
        assert_eq!(read(&*node, 4096, 512).await.unwrap(), pattern(4096, 512));
    });
}

#[test]
fn reads_survive_a_restart_of_the_server() {
    for gently in [false, true] {
        run(async {
            let mut server = Server::nbdkit(&["--filter=delay", "pattern", "64M", "rdelay=100ms"]);
            let node = connect(&server, NbdOptions::default()).await;
            let in_flight = join_all((0..40).map(|i| read(&*node, i * MIB, 65536)));
            let restart = async {
                tokio::time::sleep(Duration::from_millis(30)).await;
                if gently {
                    // It closes when it has answered what it has begun; waiting for that must not stop the client.
                    server = tokio::task::spawn_blocking(move || {
                        server.terminate();
                        server
                    })
                    .await
                    .unwrap();
                } else {
                    server.stop();
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
                server.restart_nbdkit(&["pattern", "64M"]);
                server
            };
            let (done, _server) = futures_util::future::join(in_flight, restart).await;
            for (i, done) in (0..).zip(done) {
                assert_eq!(done.unwrap(), pattern(i * MIB, 65536));
            }
        });
    }
}

#[test]
fn a_unix_socket_gets_another_connection_only_beyond_the_servers_depth() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let logfile = format!("logfile={}", log.display());
        let server =
            Server::nbdkit(&["--filter=log", "--filter=delay", "pattern", "64M", "rdelay=30ms", &logfile]);
        let node = connect(&server, NbdOptions::default()).await;
        let connections = || {
            std::fs::read_to_string(&log).unwrap().lines().filter(|line| line.contains(" Connect ")).count()
        };
        for (at_once, more) in [(16, false), (48, true)] {
            for done in join_all((0..at_once).map(|i| read(&*node, i * MIB, 4096))).await {
                done.unwrap();
            }
            assert_eq!(connections() > 1, more, "{at_once} reads at once");
        }
    });
}

#[test]
fn closing_says_good_bye() {
    run(async {
        let mut server = Server::nbdkit(&["--filter=exitlast", "pattern", "1M"]);
        let node = connect(&server, NbdOptions::default()).await;
        join_all((0..64).map(|i| read(&*node, i * 4096, 4096))).await;
        node.close().await.unwrap();
        // A further connection that was being made is given up by its task, which must get to run.
        while !server.has_ended() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}

#[test]
fn a_server_over_tcp_with_an_odd_size() {
    run(async {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let args = ["-p", &port.to_string(), "-i", "127.0.0.1", "pattern", "size=1000003"];
        let _server = Server::nbdkit(&args);
        let node =
            NbdNode::connect(&format!("nbd://localhost:{port}/"), NbdOptions::default()).await.unwrap();
        assert_eq!(node.size(), 1_000_003);
        let mut expected = pattern(0, 1_000_003);
        expected.resize(1 << 20, 0);
        assert!(read(&*node, 0, 1 << 20).await.unwrap() == expected);
        assert_eq!(node.status(0..1 << 20).await.unwrap().end(), 1_000_003);
        node.close().await.unwrap();
    });
}

#[test]
fn a_size_that_is_no_multiple_of_the_servers_block() {
    run(async {
        let server = Server::nbdkit(&[
            "--filter=blocksize-policy",
            "--filter=truncate",
            "pattern",
            "1M",
            "truncate=1000003",
            "blocksize-minimum=512",
        ]);
        let node = connect(&server, NbdOptions::default()).await;
        assert_eq!(node.size(), 1_000_003);
        for (offset, len) in [(0, 512), (511, 2), (900_000, 100_000), (1_000_000, 3), (999_990, 50)] {
            let mut expected = pattern(offset, len.min(1_000_003 - offset as usize));
            expected.resize(len, 0);
            assert!(read(&*node, offset, len).await.unwrap() == expected, "{offset} {len}");
        }
        let mut at = 0;
        while at < node.size() {
            at = node.status(at..node.size()).await.unwrap().end();
        }
    });
}

#[test]
fn a_source_in_thousands_of_pieces_is_walked() {
    run(async {
        let server = Server::nbdkit(&["sparse-random", "2G", "seed=7", "percent=50", "runlength=4096"]);
        let node = connect(&server, NbdOptions::default()).await;
        let (mut at, mut pieces, mut zeroes) = (0, 0, 0);
        while at < 64 * MIB {
            let extent = node.status(at..node.size()).await.unwrap();
            let is_zero = extent.kind == ExtentKind::Zero;
            if pieces % 100 == 0 {
                let bytes = read(&*node, at, 4096).await.unwrap();
                assert_eq!(bytes.iter().all(|byte| *byte == 0), is_zero);
            }
            pieces += 1;
            zeroes += u64::from(is_zero);
            at = extent.end();
        }
        assert!(pieces > 1000 && zeroes > 500, "{pieces} {zeroes}");
    });
}

#[test]
fn without_a_server_reads_fail_when_the_time_is_over() {
    run(async {
        let mut server = Server::nbdkit(&["pattern", "64M"]);
        let node =
            connect(&server, NbdOptions { retry: Duration::from_millis(300), ..NbdOptions::default() }).await;
        read(&*node, 0, 512).await.unwrap();
        server.stop();
        let start = tokio::time::Instant::now();
        let error = read(&*node, 0, 512).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(250) && took < Duration::from_secs(3), "{took:?}");
        server.restart_nbdkit(&["pattern", "64M"]);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(read(&*node, 0, 512).await.unwrap(), pattern(0, 512), "it comes back by itself");
    });
}

#[test]
fn another_size_after_reconnecting_is_another_source() {
    run(async {
        let mut server = Server::nbdkit(&["pattern", "64M"]);
        let node = connect(&server, NbdOptions::default()).await;
        read(&*node, 0, 512).await.unwrap();
        server.restart_nbdkit(&["pattern", "32M"]);
        for _ in 0..2 {
            let error = read(&*node, 0, 512).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::SourceChanged, "{error}");
        }
    });
}

#[test]
fn a_flush_after_a_lost_connection_does_not_promise_what_is_gone() {
    run(async {
        let mut server = Server::nbdkit(&["memory", "8M"]);
        let node = connect(&server, NbdOptions::default()).await;
        node.write(0, Buffer::copy_of(b"abc"), WriteFlags::default()).await.unwrap();
        server.restart_nbdkit(&["memory", "8M"]);
        for _ in 0..2 {
            let error = node.flush().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        }
    });
}

#[test]
fn qemu_nbd_serves_an_image_with_one_connection_and_with_many() {
    run(async {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 * MIB).unwrap();
        std::os::unix::fs::FileExt::write_all_at(file.as_file(), &pattern(0, 2 << 20), 8 * MIB).unwrap();
        let path = file.path().to_str().unwrap();
        for args in [&["-r", "-f", "raw", path][..], &["-r", "-e", "8", "-f", "raw", path]] {
            let server = Server::qemu_nbd(args);
            let node = connect(&server, NbdOptions::default()).await;
            assert_eq!(node.size(), 64 * MIB);
            let reads = join_all((0..64).map(|i| read(&*node, i * MIB, 1 << 20))).await;
            for (i, done) in reads.into_iter().enumerate() {
                let expected =
                    if i == 8 || i == 9 { pattern((i as u64 - 8) * MIB, 1 << 20) } else { vec![0; 1 << 20] };
                assert!(done.unwrap() == expected, "MiB {i}");
            }
            assert_eq!(node.status(0..64 * MIB).await.unwrap(), Extent::new(0, 8 * MIB, ExtentKind::Zero));
            assert_eq!(node.status(8 * MIB..64 * MIB).await.unwrap().end(), 10 * MIB);
            node.close().await.unwrap();
        }
    });
}

#[test]
fn what_cannot_be_opened_says_why() {
    run(async {
        let server = Server::nbdkit(&[
            "--filter=exportname",
            "pattern",
            "1M",
            "exportname-list=explicit",
            "exportname=a",
            "exportname-strict=true",
        ]);
        let socket = server.socket();
        let open = |uri: String| async move {
            match NbdNode::connect(&uri, NbdOptions::default()).await {
                Ok(_) => panic!("{uri} was opened"),
                Err(error) => error,
            }
        };
        let error = open(format!("nbd+unix:///b?socket={}", socket.display())).await;
        assert!(
            matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput | ErrorKind::Unavailable),
            "{error:?}"
        );
        let error = open("nbd+unix:///?socket=/nowhere/nbd".to_owned()).await;
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        let error = open("nbd://127.0.0.1:1/".to_owned()).await;
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        let error = open("nbds://localhost/".to_owned()).await;
        assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("TLS"), "{error}");
    });
}
