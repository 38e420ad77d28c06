//! The NBD client with extended headers: long answers of an honest server, and servers that break the protocol.

mod support;

use headwater_block::{BufferMut, ErrorKind, ExtentKind, Node};
use headwater_nbd::reply::{self, STATE_HOLE, STATE_ZERO, StatusExtent};
use headwater_nbd::{
    BlockSizes, Command, ErrorCode, ExportInfo, Headers, ReplyTo, Request, ServerHandshake, ServerOutcome,
    ServerRules, Step, TransmissionFlags,
};
use headwater_storage::nbd::{NbdNode, NbdOptions, Server};
use std::io;
use std::rc::Rc;
use std::time::Duration;
use support::run;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// More than a compact header can ask for.
const SIZE: u64 = 1 << 50;

fn export() -> ExportInfo {
    ExportInfo {
        name: "disk".to_owned(),
        description: String::new(),
        size: SIZE,
        flags: TransmissionFlags::SEND_FLUSH,
        block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 },
        contexts: vec!["base:allocation".to_owned()],
    }
}

/// What a server says to a request.
type Answer = fn(&Request, ReplyTo) -> Vec<u8>;

/// What is done to a good answer.
type Spoil = fn(&mut Vec<u8>);

/// Agrees on extended headers; gives what came after that.
async fn negotiate(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let (mut input, mut output) = (Vec::new(), Vec::new());
    let mut state = ServerHandshake::new(ServerRules::default(), &mut output);
    loop {
        stream.write_all(&output).await?;
        output.clear();
        match state.step(|| vec![export()], &input, &mut output).map_err(io::Error::other)? {
            Step::More { state: same, .. } => {
                if stream.read_buf(&mut input).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                state = same;
            }
            Step::Next { state: next, consumed } => {
                input.drain(..consumed);
                state = next;
            }
            Step::Done { outcome, consumed } => {
                stream.write_all(&output).await?;
                input.drain(..consumed);
                let ServerOutcome::Transmission(choice) = outcome else { panic!("{outcome:?}") };
                assert_eq!(choice.headers, Headers::Extended);
                return Ok(input);
            }
        }
    }
}

/// A node whose server answers each request with what `answer` makes of it.
async fn connect(answer: impl Fn(&Request, ReplyTo) -> Vec<u8> + 'static) -> Rc<NbdNode> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut stream = UnixStream::from_std(theirs).unwrap();
    tokio::task::spawn_local(async move {
        let mut input = negotiate(&mut stream).await?;
        loop {
            while let Ok(Some(request)) = Request::decode(&input, Headers::Extended) {
                input.drain(..Request::EXTENDED_LEN);
                let to =
                    ReplyTo { headers: Headers::Extended, cookie: request.cookie, offset: request.offset };
                stream.write_all(&answer(&request, to)).await?;
            }
            if stream.read_buf(&mut input).await? == 0 {
                return io::Result::Ok(());
            }
        }
    });
    let options = NbdOptions {
        retry: Duration::ZERO,
        request_timeout: Duration::from_secs(5),
        ..NbdOptions::default()
    };
    NbdNode::open(Server::Fd(ours.into()), "disk", options).await.unwrap()
}

#[test]
fn one_request_tells_of_terabytes() {
    run(async {
        let asked = Rc::new(std::cell::RefCell::new(Vec::new()));
        let seen = asked.clone();
        let node = connect(move |request, to| {
            assert_eq!(request.command, Command::BlockStatus);
            seen.borrow_mut().push(request.length);
            let extents = [StatusExtent { length: SIZE - request.offset, flags: STATE_HOLE | STATE_ZERO }];
            let mut bytes = Vec::new();
            reply::encode_block_status(&mut bytes, to, 0, &extents, true);
            bytes
        })
        .await;
        let extent = node.status(0..SIZE).await.unwrap();
        assert_eq!((extent.offset, extent.len), (0, SIZE));
        assert_ne!(extent.kind, ExtentKind::Data);
        assert_eq!(asked.borrow().len(), 1, "it is asked once");
    });
}

#[test]
fn a_walk_over_data_takes_longer_and_longer_steps() {
    run(async {
        let asked = Rc::new(std::cell::RefCell::new(Vec::new()));
        let seen = asked.clone();
        let node = connect(move |request, to| {
            seen.borrow_mut().push(request.length);
            let mut bytes = Vec::new();
            let extents = [StatusExtent { length: request.length, flags: 0 }];
            reply::encode_block_status(&mut bytes, to, 0, &extents, true);
            bytes
        })
        .await;
        let mut at = 0;
        while at < SIZE {
            at += node.status(at..SIZE).await.unwrap().len;
        }
        let asked = asked.borrow();
        assert!(asked.len() < 100 && asked.iter().any(|length| *length > 1 << 32), "{asked:?}");
    });
}

#[test]
fn replies_that_break_the_protocol_end_the_connection() {
    run(async {
        let data =
            |to: ReplyTo, at: u64| [&reply::encode_data_prefix(to, at, 4096, true)[..], &[7; 4096]].concat();
        let good = connect(move |request, to| data(to, request.offset)).await;
        assert_eq!(good.read(1 << 45, BufferMut::new(4096)).await.unwrap()[..], [7; 4096]);

        let refused = connect(|_, to| {
            let mut bytes = Vec::new();
            reply::encode_error(&mut bytes, to, ErrorCode::NotSupported, "no");
            bytes
        })
        .await;
        let error = refused.read(0, BufferMut::new(4096)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);

        let bad: [(&str, Answer); 7] = [
            ("another offset", |request, to| {
                let to = ReplyTo { offset: request.offset + 512, ..to };
                [&reply::encode_data_prefix(to, request.offset, 4096, true)[..], &[7; 4096]].concat()
            }),
            ("another request", |_, to| {
                let to = ReplyTo { cookie: to.cookie + 1, ..to };
                reply::encode_done(to).to_vec()
            }),
            ("a simple reply", |request, _| {
                [&reply::encode_simple(request.cookie, None)[..], &[0; 4096]].concat()
            }),
            ("a compact chunk", |request, _| {
                reply::encode_hole(request.cookie, request.offset, 4096, true).to_vec()
            }),
            ("more than was asked for", |request, to| {
                reply::encode_hole(to, request.offset, 8192, true).to_vec()
            }),
            ("no data", |_, to| reply::encode_done(to).to_vec()),
            ("a payload without end", |_, to| {
                let mut bytes = reply::encode_data_prefix(to, to.offset, 4096, true).to_vec();
                bytes[24..32].fill(0xff);
                bytes
            }),
        ];
        for (what, answer) in bad {
            let node = connect(answer).await;
            let error = node.read(8192, BufferMut::new(4096)).await.unwrap_err();
            assert_ne!(error.kind(), ErrorKind::TimedOut, "{what}: {error}");
        }
    });
}

#[test]
fn a_status_that_makes_no_sense_is_not_believed() {
    run(async {
        let bad: [(&str, Spoil); 4] = [
            ("another count", |bytes| bytes[32 + 7] = 2),
            ("unknown flags", |bytes| bytes[32 + 16] = 1),
            ("an empty extent", |bytes| bytes[32 + 8..32 + 16].fill(0)),
            ("another context", |bytes| bytes[32 + 3] = 9),
        ];
        for (what, spoil) in bad {
            let node = connect(move |request, to| {
                let mut bytes = Vec::new();
                let extents = [StatusExtent { length: request.length, flags: STATE_ZERO }];
                reply::encode_block_status(&mut bytes, to, 0, &extents, true);
                spoil(&mut bytes);
                bytes
            })
            .await;
            let error = node.status(0..4096).await.unwrap_err();
            assert_ne!(error.kind(), ErrorKind::TimedOut, "{what}: {error}");
        }
    });
}
