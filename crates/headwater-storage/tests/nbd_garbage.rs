//! The NBD client against servers that break the protocol: each ends in an error, none in a panic, a hang or a wrong byte.

mod support;

use headwater_block::{ErrorKind, Node};
use headwater_storage::nbd::{NbdNode, NbdOptions};
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;
use support::{pattern, read, run};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

const SIZE: u64 = 1 << 20;

type Script = dyn Fn(UnixStream) -> Pin<Box<dyn Future<Output = std::io::Result<()>>>>;

/// A server that runs a script for each client.
struct Bad {
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Bad {
    fn start<F, R>(script: F) -> Self
    where
        F: Fn(UnixStream) -> R + 'static,
        R: Future<Output = std::io::Result<()>> + 'static,
    {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("bad");
        let listener = UnixListener::bind(&socket).unwrap();
        let script: Rc<Script> = Rc::new(move |stream| Box::pin(script(stream)));
        tokio::task::spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A script ends when its client goes.
                let run = script(stream);
                tokio::task::spawn_local(async move {
                    let _ = run.await;
                });
            }
        });
        Self { socket, _directory: directory }
    }

    async fn connect(&self) -> Result<Rc<NbdNode>, headwater_block::Error> {
        let options = NbdOptions {
            connect_timeout: Duration::from_millis(500),
            request_timeout: Duration::from_millis(150),
            retry: Duration::from_millis(200),
            ..NbdOptions::default()
        };
        NbdNode::connect(&format!("nbd+unix:///?socket={}", self.socket.display()), options).await
    }
}

/// Negotiates as a server should: structured replies, `base:allocation` as context 1, an export of `SIZE` bytes.
async fn negotiate(stream: &mut UnixStream, size: u64) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").await?;
    stream.read_u32().await?;
    loop {
        stream.read_u64().await?;
        let option = stream.read_u32().await?;
        let mut data = vec![0; stream.read_u32().await? as usize];
        stream.read_exact(&mut data).await?;
        let mut replies = Vec::new();
        let mut reply = |kind: u32, data: &[u8]| {
            replies.extend_from_slice(&0x0003_e889_0455_65a9_u64.to_be_bytes());
            replies.extend_from_slice(&option.to_be_bytes());
            replies.extend_from_slice(&kind.to_be_bytes());
            replies.extend_from_slice(&(data.len() as u32).to_be_bytes());
            replies.extend_from_slice(data);
        };
        match option {
            8 => reply(1, &[]),
            10 => {
                reply(4, b"\0\0\0\x01base:allocation");
                reply(1, &[]);
            }
            7 => {
                let info = [&[0, 0], &size.to_be_bytes()[..], &[0, 3]].concat();
                reply(3, &info);
                reply(1, &[]);
            }
            _ => reply(1 << 31 | 1, &[]),
        }
        stream.write_all(&replies).await?;
        if option == 7 {
            return Ok(());
        }
    }
}

struct Asked {
    cookie: u64,
    offset: u64,
    length: u32,
}

/// The next request.
async fn request(stream: &mut UnixStream) -> std::io::Result<Asked> {
    stream.read_u64().await?;
    let cookie = stream.read_u64().await?;
    Ok(Asked { cookie, offset: stream.read_u64().await?, length: stream.read_u32().await? })
}

fn chunk(kind: u16, done: bool, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::from(done).to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn data(asked: &Asked, offset: u64, len: usize, done: bool) -> Vec<u8> {
    chunk(1, done, asked.cookie, &[&offset.to_be_bytes()[..], &pattern(offset, len)].concat())
}

fn hole(asked: &Asked, offset: u64, len: u32, done: bool) -> Vec<u8> {
    chunk(2, done, asked.cookie, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

/// What a read of 4096 bytes at 8192 gives if each request is answered with what `answer` makes of it.
async fn read_with(answer: impl Fn(&Asked) -> Vec<u8> + 'static) -> Result<Vec<u8>, headwater_block::Error> {
    let answer = Rc::new(answer);
    let server = Bad::start(move |mut stream| {
        let answer = answer.clone();
        async move {
            negotiate(&mut stream, SIZE).await?;
            loop {
                let asked = request(&mut stream).await?;
                stream.write_all(&answer(&asked)).await?;
            }
        }
    });
    read(&*server.connect().await.unwrap(), 8192, 4096).await
}

#[test]
fn chunks_may_come_in_any_order_and_number() {
    run(async {
        let got = read_with(|asked| {
            let at = asked.offset;
            [
                data(asked, at + 3000, 1096, false),
                hole(asked, at + 10, 2000, false),
                data(asked, at, 10, false),
                data(asked, at + 2010, 990, false),
                chunk(0, true, asked.cookie, &[]),
            ]
            .concat()
        });
        let mut expected = pattern(8192, 4096);
        expected[10..2010].fill(0);
        assert_eq!(got.await.unwrap(), expected);
    });
}

#[test]
fn replies_that_break_the_protocol_end_in_an_error() {
    run(async {
        type Answer = fn(&Asked) -> Vec<u8>;
        let answers: [(&str, Answer); 17] = [
            ("random bytes", |_| b"this is not an NBD reply at all".to_vec()),
            ("an unknown cookie", |asked| chunk(0, true, asked.cookie + 7, &[])),
            ("no data", |asked| chunk(0, true, asked.cookie, &[])),
            ("too few data", |asked| data(asked, asked.offset, 100, true)),
            ("data before the range", |asked| data(asked, asked.offset - 1, 4096, true)),
            ("data after the range", |asked| data(asked, asked.offset + 4096, 10, true)),
            ("data at the end of everything", |asked| data(asked, u64::MAX - 4, 4, true)),
            ("the same data twice", |asked| {
                [data(asked, asked.offset, 4096, false), data(asked, asked.offset, 4096, true)].concat()
            }),
            ("a hole that is too long", |asked| hole(asked, asked.offset, u32::MAX, true)),
            ("an empty hole", |asked| hole(asked, asked.offset, 0, true)),
            ("an endless chunk", |asked| {
                let mut bytes = chunk(1, true, asked.cookie, &[]);
                bytes[16..].copy_from_slice(&u32::MAX.to_be_bytes());
                bytes
            }),
            ("an endless error", |asked| {
                let mut bytes = chunk(1 << 15 | 1, true, asked.cookie, &[]);
                bytes[16..].copy_from_slice(&(1_u32 << 31).to_be_bytes());
                bytes
            }),
            ("a status that was not asked for", |asked| {
                chunk(5, true, asked.cookie, &[0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 0])
            }),
            ("a chunk of unknown kind", |asked| chunk(77, true, asked.cookie, &[0; 8])),
            ("an error that is none", |asked| chunk(1 << 15 | 1, true, asked.cookie, &[0; 6])),
            ("a simple reply", |asked| {
                let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
                bytes.extend_from_slice(&[0; 4]);
                bytes.extend_from_slice(&asked.cookie.to_be_bytes());
                bytes.extend_from_slice(&vec![0; asked.length as usize]);
                bytes
            }),
            ("byte by byte", |asked| {
                (0..4096).flat_map(|i| data(asked, asked.offset + i, 1, i == 4095)).collect()
            }),
        ];
        for (name, answer) in answers {
            let error = read_with(answer).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
            assert!(error.to_string().contains("nbd+unix:///"), "{name}: {error}");
        }
    });
}

#[test]
fn a_server_that_is_silent_or_goes_is_unavailable() {
    run(async {
        let error = read_with(|_| Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        let error = read_with(|asked| {
            let mut half = data(asked, asked.offset, 4096, true);
            half.truncate(1000);
            half
        });
        assert_eq!(error.await.unwrap_err().kind(), ErrorKind::TimedOut);
        let server = Bad::start(|mut stream| async move {
            negotiate(&mut stream, SIZE).await?;
            let asked = request(&mut stream).await?;
            stream.write_all(&data(&asked, asked.offset, 4096, true)[..1000]).await
        });
        let error = read(&*server.connect().await.unwrap(), 8192, 4096).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    });
}

#[test]
fn an_error_chunk_fails_its_request_alone() {
    run(async {
        let message = b"\0\0\0\x05\0\x04oops";
        let error = read_with(|asked| chunk(1 << 15 | 1, true, asked.cookie, message)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().ends_with("(NBD_EIO): oops"), "{error}");
    });
}

#[test]
fn a_status_is_believed_only_as_far_as_it_makes_sense() {
    run(async {
        for (name, payload, good) in [
            ("longer than asked", &[0, 0, 0, 1, 255, 255, 255, 255, 0, 0, 0, 3][..], true),
            ("of another context", &[0, 0, 0, 2, 0, 0, 16, 0, 0, 0, 0, 0], false),
            ("of no length", &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], false),
            ("half an extent", &[0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0], false),
        ] {
            let server = Bad::start(move |mut stream| async move {
                negotiate(&mut stream, SIZE).await?;
                loop {
                    let asked = request(&mut stream).await?;
                    stream.write_all(&chunk(5, true, asked.cookie, payload)).await?;
                }
            });
            let node = server.connect().await.unwrap();
            match node.status(4096..SIZE).await {
                Ok(extent) => assert!(good && extent.end() == SIZE, "{name}: {extent:?}"),
                Err(error) => assert!(!good && error.kind() == ErrorKind::Corrupt, "{name}: {error}"),
            }
        }
    });
}

#[test]
fn servers_that_do_not_speak_nbd_are_named() {
    run(async {
        type Greeting = (&'static [u8], ErrorKind);
        let greetings: [Greeting; 5] = [
            (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", ErrorKind::Corrupt),
            (b"NBDMAGICwhatever it is, it is wrong", ErrorKind::Corrupt),
            (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0\0\0\0\0\0\0", ErrorKind::Unsupported),
            (b"NBDM", ErrorKind::TimedOut),
            (b"", ErrorKind::TimedOut),
        ];
        for (greeting, expected) in greetings {
            let server = Bad::start(move |mut stream| async move {
                stream.write_all(greeting).await?;
                // Stays there until the client goes.
                stream.read_to_end(&mut Vec::new()).await.map(drop)
            });
            let Err(error) = server.connect().await else { panic!("{greeting:?} was taken for a server") };
            assert_eq!(error.kind(), expected, "{error}");
        }
        let server = Bad::start(|mut stream| async move { stream.write_all(b"NBDMAGICIHAVEOPT").await });
        let Err(error) = server.connect().await else { panic!("no server") };
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        let server = Bad::start(|mut stream| async move {
            negotiate(&mut stream, u64::MAX).await?;
            stream.read_to_end(&mut Vec::new()).await.map(drop)
        });
        let Err(error) = server.connect().await else { panic!("an export of 16 EiB") };
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    });
}

#[test]
fn random_bytes_at_any_stage_do_no_harm() {
    run(async {
        use std::cell::Cell;
        let seed = Rc::new(Cell::new(1_u64));
        let server = Bad::start(move |mut stream| {
            let seed = seed.clone();
            async move {
                let random = || {
                    seed.set(
                        seed.get()
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407),
                    );
                    (seed.get() >> 33) as u8
                };
                if random() % 4 != 0 {
                    negotiate(&mut stream, SIZE).await?;
                }
                while let Ok(asked) = request(&mut stream).await {
                    let mut reply = data(&asked, asked.offset, asked.length as usize, true);
                    let at = usize::from(random()) % 40;
                    if random() % 3 == 0
                        && let Some(byte) = reply.get_mut(at)
                    {
                        *byte = random();
                    }
                    stream.write_all(&reply).await?;
                }
                Ok(())
            }
        });
        let mut good = 0;
        for _ in 0..40 {
            let Ok(node) = server.connect().await else { continue };
            for at in 0..5_u64 {
                match tokio::time::timeout(Duration::from_secs(5), read(&*node, at * 4096, 4096)).await {
                    Ok(Ok(bytes)) => good += usize::from(bytes.len() == 4096),
                    Ok(Err(_)) => {}
                    Err(_) => panic!("a read hangs"),
                }
            }
        }
        assert!(good > 20, "{good}");
    });
}

#[test]
fn whatever_the_moment_a_line_is_cut_reads_give_the_right_bytes() {
    run(async {
        let random = Rc::new(std::cell::Cell::new(88_172_645_463_325_252_u64));
        let server = Bad::start(move |mut stream| {
            let mut next = random.get();
            next ^= next << 13;
            next ^= next >> 7;
            next ^= next << 17;
            random.set(next);
            async move {
                negotiate(&mut stream, 2 * SIZE).await?;
                let mut left = (next % 3_000_000) as usize;
                loop {
                    let asked = request(&mut stream).await?;
                    let reply = data(&asked, asked.offset, asked.length as usize, true);
                    stream.write_all(&reply[..reply.len().min(left)]).await?;
                    if reply.len() >= left {
                        return Ok(());
                    }
                    left -= reply.len();
                }
            }
        });
        let options = NbdOptions {
            retry: Duration::from_secs(30),
            connections: Some(4),
            read_only: true,
            ..NbdOptions::default()
        };
        let uri = format!("nbd+unix:///?socket={}", server.socket.display());
        let node = NbdNode::connect(&uri, options).await.unwrap();
        for round in 0..10_u64 {
            // More than one connection takes at a time.
            let reads = (0..48_u64).map(|i| {
                let (offset, len) =
                    ((round * 16 + i / 3) * 3989, 1 + ((i / 3 * 1919) << (round % 5)) as usize);
                let (node, give_up) = (&node, Duration::from_millis(if i % 5 == 0 { 1 } else { 40_000 }));
                async move {
                    match tokio::time::timeout(give_up, read(&**node, offset, len)).await {
                        Ok(done) => assert!(done.unwrap()[..] == pattern(offset, len)[..], "{offset} {len}"),
                        Err(_) => assert!(i % 5 == 0, "a read hangs"),
                    }
                }
            });
            futures_util::future::join_all(reads).await;
        }
    });
}
