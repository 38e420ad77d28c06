//! Tests of negotiation: our client against our server, each against hand-written bytes, and both against garbage.

use proptest::prelude::*;

use super::*;
use crate::flags::TransmissionFlags;
use crate::headers::Headers;

mod tls;

fn export(name: &str) -> ExportInfo {
    ExportInfo {
        name: name.to_owned(),
        description: format!("the disk {name}"),
        size: 1 << 30,
        flags: TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_DF,
        block_sizes: BlockSizes { minimum: 1, preferred: 65536, maximum: 32 << 20 },
        contexts: vec![BASE_ALLOCATION.to_owned(), ALLOCATION_DEPTH.to_owned()],
    }
}

const LENIENT: ServerRules = ServerRules { tls: false, empty_name_is_only_export: true };

/// Drives a server with all of `input`, fed `piece` bytes at a time. Returns its output and how it ended.
fn serve(
    exports: Vec<ExportInfo>,
    input: &[u8],
    piece: usize,
) -> (Vec<u8>, Result<Option<ServerOutcome>, ProtocolError>) {
    let mut output = Vec::new();
    let mut server = ServerHandshake::new(LENIENT, &mut output);
    let (mut buffered, mut fed) = (Vec::new(), 0);
    loop {
        match server.step(|| exports.clone(), &buffered, &mut output) {
            Ok(Step::Done { outcome, consumed }) => {
                assert!(consumed <= buffered.len());
                return (output, Ok(Some(outcome)));
            }
            Ok(Step::Next { state, consumed }) => {
                assert!(consumed > 0);
                buffered.drain(..consumed);
                server = state;
            }
            Ok(Step::More { state, needed }) => {
                assert!(needed > buffered.len(), "asks for what it has");
                assert!(needed <= OPTION_LEN + MAX_OPTION as usize, "would buffer {needed} bytes");
                if fed == input.len() {
                    return (output, Ok(None));
                }
                let next = input.len().min(fed + piece);
                buffered.extend_from_slice(&input[fed..next]);
                fed = next;
                server = state;
            }
            Err(error) => return (output, Err(error)),
        }
    }
}

/// A client of our own against a server of our own.
fn talk(exports: Vec<ExportInfo>, ask: ClientAsk) -> Result<(ServerOffer, ServerOutcome), ProtocolError> {
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    let mut server = Some(ServerHandshake::new(LENIENT, &mut to_client));
    let mut client = ClientHandshake::new(ask);
    let mut chosen = None;
    loop {
        match client.step(&to_client, &mut to_server)? {
            Step::Done { outcome, consumed } => {
                assert_eq!(consumed, to_client.len(), "nothing follows until the client speaks");
                return Ok((outcome, chosen.expect("the server was done first")));
            }
            Step::Next { state, consumed } => {
                to_client.drain(..consumed);
                client = state;
            }
            Step::More { state, .. } => {
                client = state;
                let Some(running) = server.take() else { return Err(client.closed()) };
                match running.step(|| exports.clone(), &to_server, &mut to_client)? {
                    Step::Done { outcome, consumed } => {
                        to_server.drain(..consumed);
                        chosen = Some(outcome);
                    }
                    Step::Next { state, consumed } => {
                        to_server.drain(..consumed);
                        server = Some(state);
                    }
                    Step::More { .. } => panic!("both wait"),
                }
            }
        }
    }
}

/// Bytes of a client: its flags and options.
fn client_bytes(flags: u32, options: &[(OptionCode, &[u8])]) -> Vec<u8> {
    let mut bytes = flags.to_be_bytes().to_vec();
    for (option, data) in options {
        encode_option(&mut bytes, *option, data);
    }
    bytes
}

/// The replies after the greeting: option, type, data.
fn replies(mut output: &[u8]) -> Vec<(OptionCode, u32, Vec<u8>)> {
    output = &output[GREETING_LEN..];
    let mut replies = Vec::new();
    while !output.is_empty() {
        let mut reader = Reader::new(output);
        assert_eq!(reader.u64(), Some(wire::OPTION_REPLY));
        let (option, kind) = (OptionCode::from_wire(reader.u32().unwrap()), reader.u32().unwrap());
        let length = reader.u32().unwrap() as usize;
        replies.push((option, kind, reader.bytes(length).unwrap().to_vec()));
        output = &output[OPTION_REPLY_LEN + length..];
    }
    replies
}

fn named(name: &str, rest: &[u8]) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, name);
    data.extend_from_slice(rest);
    data
}

#[test]
fn client_and_server_agree() {
    let (offer, outcome) = talk(vec![export("a"), export("b")], ClientAsk::new("b")).unwrap();
    assert_eq!(offer.size, 1 << 30);
    assert_eq!(offer.headers, Headers::Extended);
    assert!(offer.flags.contains(TransmissionFlags::SEND_DF | TransmissionFlags::BLOCK_STATUS_PAYLOAD));
    assert_eq!(offer.block_sizes.preferred, 65536);
    assert_eq!(offer.name.as_deref(), Some("b"));
    assert_eq!(offer.description.as_deref(), Some("the disk b"));
    assert_eq!((offer.context(BASE_ALLOCATION), offer.context(ALLOCATION_DEPTH)), (Some(0), None));
    let ServerOutcome::Transmission(choice) = outcome else { panic!("{outcome:?}") };
    assert_eq!(
        (&*choice.export.name, choice.export.flags, choice.headers),
        ("b", offer.flags, Headers::Extended)
    );
    assert_eq!(choice.contexts, offer.contexts);
}

#[test]
fn without_structured_replies_there_is_no_df() {
    let ask = ClientAsk { headers: Headers::Simple, ..ClientAsk::new("a") };
    let (offer, _) = talk(vec![export("a")], ask).unwrap();
    assert!(offer.headers == Headers::Simple && offer.contexts.is_empty());
    assert!(!offer.flags.contains(TransmissionFlags::SEND_DF));
    let ask = ClientAsk { headers: Headers::Structured, ..ClientAsk::new("a") };
    let (offer, _) = talk(vec![export("a")], ask).unwrap();
    assert!(offer.headers == Headers::Structured && !offer.contexts.is_empty());
    assert!(!offer.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD));
}

#[test]
fn extended_headers_are_agreed_on_once_and_not_left_again() {
    let options: [(OptionCode, &[u8]); 6] = [
        (OptionCode::ExtendedHeaders, b"data"),
        (OptionCode::StructuredReply, b""),
        (OptionCode::ExtendedHeaders, b""),
        (OptionCode::ExtendedHeaders, b""),
        (OptionCode::StructuredReply, b""),
        (OptionCode::ExportName, b"a"),
    ];
    let (output, outcome) = serve(vec![export("a")], &client_bytes(FIXED_NEWSTYLE, &options), 1000);
    let kinds: Vec<u32> = replies(&output).into_iter().map(|(_, kind, _)| kind).collect();
    let (invalid, required) =
        (OptionRefusal::Invalid.to_wire(), OptionRefusal::ExtendedHeadersRequired.to_wire());
    assert_eq!(kinds, [invalid, REP_ACK, REP_ACK, invalid, required]);
    assert_eq!(outcome, Ok(Some(ServerOutcome::Closed)), "an export is not to be had that way");
}

#[test]
fn a_server_without_extended_headers_is_asked_for_structured_replies() {
    let unsupported = OptionRefusal::Unsupported.to_wire();
    let info = [&INFO_EXPORT.to_be_bytes()[..], &(1_u64 << 20).to_be_bytes(), &1_u16.to_be_bytes()].concat();
    let input = [
        greeting(3),
        reply(OptionCode::ExtendedHeaders, unsupported, b"?"),
        reply(OptionCode::StructuredReply, REP_ACK, b""),
        reply(OptionCode::SetMetaContext, REP_ACK, b""),
        reply(OptionCode::Go, REP_INFO, &info),
        reply(OptionCode::Go, REP_ACK, b""),
    ];
    let offer = listen(&input.concat(), ClientAsk::new("x")).unwrap();
    assert_eq!((offer.headers, offer.size), (Headers::Structured, 1 << 20));
}

#[test]
fn the_empty_name_means_the_only_export() {
    let (offer, _) = talk(vec![export("a")], ClientAsk::new("")).unwrap();
    assert_eq!(offer.name.as_deref(), Some("a"));
    let error = talk(vec![export("a"), export("b")], ClientAsk::new("")).unwrap_err();
    assert!(matches!(error, ProtocolError::Refused { refusal: OptionRefusal::UnknownExport, .. }), "{error}");
}

#[test]
fn exports_are_listed() {
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    let exports = || vec![export("a"), export("b")];
    let mut server = ServerHandshake::new(ServerRules::default(), &mut to_client);
    let mut client = ListHandshake::new();
    let listed = loop {
        client = match client.step(&to_client, &mut to_server).unwrap() {
            Step::Done { outcome, .. } => break outcome,
            Step::Next { state, consumed } => {
                to_client.drain(..consumed);
                state
            }
            Step::More { state, .. } => {
                let Step::Next { state: next, consumed } =
                    server.step(exports, &to_server, &mut to_client).unwrap()
                else {
                    panic!("the server has nothing to do")
                };
                to_server.drain(..consumed);
                server = next;
                state
            }
        };
    };
    assert_eq!(listed.iter().map(|export| export.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(listed[1].description, "the disk b");
}

#[test]
fn export_name_ends_negotiation_with_and_without_padding() {
    for (flags, length) in [(FIXED_NEWSTYLE | NO_ZEROES, 10), (FIXED_NEWSTYLE, 134), (0, 134)] {
        let input = client_bytes(flags, &[(OptionCode::ExportName, b"a")]);
        let (output, outcome) = serve(vec![export("a")], &input, 1);
        assert!(matches!(outcome, Ok(Some(ServerOutcome::Transmission(_)))));
        assert_eq!(output.len() - GREETING_LEN, length);
        assert_eq!(output[GREETING_LEN..][..8], (1_u64 << 30).to_be_bytes());
    }
    let input = client_bytes(FIXED_NEWSTYLE, &[(OptionCode::ExportName, b"nothing")]);
    let (output, outcome) = serve(vec![export("a")], &input, 1000);
    assert_eq!((output.len(), outcome), (GREETING_LEN, Ok(Some(ServerOutcome::Closed))));
}

#[test]
fn refusals_leave_the_haggling_alive() {
    let unknown = [0; 3000];
    let big = vec![0; MAX_OPTION as usize + 1];
    let input = client_bytes(
        FIXED_NEWSTYLE,
        &[
            (OptionCode::Other(99), &unknown),
            (OptionCode::StartTls, b""),
            (OptionCode::Info, &big),
            (OptionCode::Info, b"\0\0\0\x09short"),
            (OptionCode::Info, &named("nothing", &[0, 0])),
            (OptionCode::Info, &named("a", &[0, 1])),
            (OptionCode::List, b"x"),
            (OptionCode::StructuredReply, b"x"),
            (OptionCode::SetMetaContext, &named("a", &[0; 4])),
            (OptionCode::StructuredReply, b""),
            (OptionCode::StructuredReply, b""),
            (OptionCode::SetMetaContext, &named("a", &[0xff; 4])),
            (OptionCode::ListMetaContext, &named("\u{0}", &[0; 4])),
            (OptionCode::Abort, b""),
        ],
    );
    use OptionRefusal as R;
    let expected = [
        Err(R::Unsupported),
        Err(R::Policy),
        Err(R::TooBig),
        Err(R::Invalid),
        Err(R::UnknownExport),
        Err(R::Invalid),
        Err(R::Invalid),
        Err(R::Invalid),
        Err(R::Invalid),
        Ok(REP_ACK),
        Err(R::Invalid),
        Err(R::Invalid),
        Err(R::UnknownExport),
        Ok(REP_ACK),
    ];
    for piece in [7, 1 << 20] {
        let (output, outcome) = serve(vec![export("a"), export("b")], &input, piece);
        assert_eq!(outcome, Ok(Some(ServerOutcome::Closed)));
        let kinds: Vec<_> = replies(&output)
            .iter()
            .map(|(_, kind, _)| OptionRefusal::from_wire(*kind).map_or(Ok(*kind), Err))
            .collect();
        assert_eq!(kinds, expected);
    }
}

#[test]
fn contexts_are_listed_by_name_and_by_namespace() {
    let query = |queries: &[&str]| {
        let mut rest = (queries.len() as u32).to_be_bytes().to_vec();
        for query in queries {
            put_string(&mut rest, query);
        }
        let data = named("a", &rest);
        let input = client_bytes(FIXED_NEWSTYLE, &[(OptionCode::ListMetaContext, &data)]);
        let (output, _) = serve(vec![export("a")], &input, 1000);
        let names = replies(&output).into_iter().filter(|(_, kind, _)| *kind == REP_META_CONTEXT);
        names.map(|(_, _, data)| String::from_utf8(data[4..].to_vec()).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(query(&[]), [BASE_ALLOCATION, ALLOCATION_DEPTH]);
    assert_eq!(query(&["qemu:"]), [ALLOCATION_DEPTH]);
    assert_eq!(query(&["base:allocation", "base:", "x:y"]), [BASE_ALLOCATION]);
    assert_eq!(query(&["base"]), [""; 0]);
}

#[test]
fn contexts_belong_to_the_export_they_were_chosen_for() {
    let contexts = named("a", &[&1_u32.to_be_bytes()[..], &named(BASE_ALLOCATION, &[])].concat());
    let outcome = |go: &str| {
        let go = named(go, &[0, 0]);
        let options = [
            (OptionCode::StructuredReply, &b""[..]),
            (OptionCode::SetMetaContext, &contexts),
            (OptionCode::Go, &go),
        ];
        match serve(vec![export("a"), export("b")], &client_bytes(FIXED_NEWSTYLE, &options), 1000).1 {
            Ok(Some(ServerOutcome::Transmission(choice))) => choice.contexts.len(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((outcome("a"), outcome("b")), (1, 0));
}

#[test]
fn block_sizes_that_matter_must_be_asked_for() {
    let mut export = export("a");
    export.block_sizes.minimum = 512;
    for (ask, kind) in [
        (&[0, 0][..], OptionRefusal::BlockSizeRequired.to_wire()),
        (&[0, 1, 0, INFO_BLOCK_SIZE as u8], REP_INFO),
    ] {
        let go = named("a", ask);
        let (output, _) =
            serve(vec![export.clone()], &client_bytes(FIXED_NEWSTYLE, &[(OptionCode::Go, &go)]), 9);
        assert_eq!(replies(&output)[0].1, kind);
    }
}

#[test]
fn rude_clients_are_cut_off() {
    let cut = |input: &[u8]| serve(vec![export("a")], input, 64).1.unwrap_err();
    assert!(matches!(cut(b"\xff\xff\xff\xff"), ProtocolError::Malformed { .. }));
    assert!(matches!(cut(&client_bytes(0, &[(OptionCode::List, b"")])), ProtocolError::Malformed { .. }));
    assert!(matches!(cut(b"\0\0\0\x01GET / HTTP/1.1\r\n"), ProtocolError::BadMagic { .. }));
    let mut huge = client_bytes(1, &[(OptionCode::Other(3), b"")]);
    let end = huge.len();
    huge[end - 4..].fill(0xff);
    assert!(matches!(cut(&huge), ProtocolError::TooLong { .. }));
    let endless = vec![(OptionCode::StartTls, &b""[..]); 5000];
    assert!(matches!(cut(&client_bytes(1, &endless)), ProtocolError::TooLong { .. }));
}

fn greeting(flags: u16) -> Vec<u8> {
    [&wire::NBDMAGIC.to_be_bytes()[..], &wire::IHAVEOPT.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn reply(option: OptionCode, kind: u32, data: &[u8]) -> Vec<u8> {
    let head = [option.to_wire(), kind, data.len() as u32].map(u32::to_be_bytes).concat();
    [&wire::OPTION_REPLY.to_be_bytes()[..], &head, data].concat()
}

/// A client that hears all of `input`, whatever it says itself.
fn listen(input: &[u8], ask: ClientAsk) -> Result<ServerOffer, ProtocolError> {
    let (mut client, mut at, mut output) = (ClientHandshake::new(ask), 0, Vec::new());
    loop {
        match client.step(&input[at..], &mut output)? {
            Step::Done { outcome, .. } => return Ok(outcome),
            Step::Next { state, consumed } => {
                assert!(consumed > 0 && at + consumed <= input.len());
                at += consumed;
                client = state;
            }
            Step::More { state, needed } => {
                assert!(needed > input.len() - at && needed <= OPTION_REPLY_LEN + MAX_OPTION as usize);
                return Err(state.closed());
            }
        }
    }
}

#[test]
fn an_old_server_is_asked_by_name() {
    let tail = [&(5_u64 << 20).to_be_bytes()[..], &3_u16.to_be_bytes(), &[0; 124]].concat();
    // Neither fixed newstyle...
    let offer = listen(&[greeting(0), tail.clone()].concat(), ClientAsk::new("x")).unwrap();
    assert_eq!(
        (offer.size, offer.headers, offer.block_sizes),
        (5 << 20, Headers::Simple, BlockSizes::UNKNOWN)
    );
    // ...nor one that knows neither structured replies nor GO.
    let unsupported = OptionRefusal::Unsupported.to_wire();
    let refusals = [OptionCode::ExtendedHeaders, OptionCode::StructuredReply, OptionCode::Go]
        .map(|option| reply(option, unsupported, b"?"))
        .concat();
    let input = [greeting(1), refusals.clone(), tail].concat();
    assert_eq!(listen(&input, ClientAsk::new("x")).unwrap().size, 5 << 20);
    let closed = listen(&[greeting(1), refusals].concat(), ClientAsk::new("x")).unwrap_err();
    assert!(closed.to_string().contains("may not have it"), "{closed}");
}

#[test]
fn bad_servers_are_named_for_what_they_are() {
    let err = |input: &[u8]| listen(input, ClientAsk::new("x")).unwrap_err().to_string();
    assert!(err(b"HTTP/1.1 200 OK\r\n\r\n").contains("does not speak NBD"));
    assert!(
        err(&[&wire::NBDMAGIC.to_be_bytes()[..], &wire::OLDSTYLE.to_be_bytes()].concat())
            .contains("oldstyle")
    );
    let tls = reply(OptionCode::ExtendedHeaders, OptionRefusal::TlsRequired.to_wire(), b"TLS\x1b[31m first");
    let message = err(&[greeting(1), tls].concat());
    assert!(message.contains("requires TLS") && !message.contains('\x1b'), "{message}");
    let other = reply(OptionCode::Info, REP_ACK, b"");
    assert!(err(&[greeting(1), other].concat()).contains("expected NBD_OPT_EXTENDED_HEADERS"));

    let plain = ClientAsk { headers: Headers::Simple, ..ClientAsk::new("x") };
    let err = |input: Vec<u8>| listen(&[greeting(3), input].concat(), plain.clone()).unwrap_err().to_string();
    assert!(err(reply(OptionCode::Go, REP_ACK, b"")).contains("size and flags are missing"));
    assert!(err(reply(OptionCode::Go, REP_INFO, b"\0\0\0")).contains("not ten bytes"));
    assert!(
        err(reply(OptionCode::Go, REP_INFO, &[0, 3, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0]))
            .contains("impossible")
    );
    assert!(err(reply(OptionCode::Go, REP_SERVER, b"")).contains("does not belong"));
    assert!(err(reply(OptionCode::Go, REP_INFO, &[9; 8]).repeat(300)).contains("more than the limit"));
    let unknown = reply(OptionCode::Go, OptionRefusal::UnknownExport.to_wire(), b"");
    assert!(err(unknown).contains("no such export"));
    let mut huge = reply(OptionCode::Go, REP_INFO, b"");
    huge[16..20].fill(0xff);
    assert!(err(huge).contains("more than the limit"));
}

fn any_option() -> impl Strategy<Value = (u32, Vec<u8>)> {
    let data = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        prop::collection::vec(any::<u8>(), 0..12).prop_map(|rest| named("a", &rest)),
        Just(named("a", &[&1_u32.to_be_bytes()[..], &named(BASE_ALLOCATION, &[])].concat())),
        Just(named("a", &[0, 0])),
        Just(Vec::new()),
    ];
    (0_u32..13, data)
}

proptest! {
    #[test]
    fn a_server_survives_any_options(
        options in prop::collection::vec(any_option(), 0..12),
        garbage in prop::collection::vec(any::<u8>(), 0..40),
        piece in 1_usize..64,
        two: bool,
    ) {
        let mut input = client_bytes(FIXED_NEWSTYLE, &[]);
        for (option, data) in &options {
            encode_option(&mut input, OptionCode::from_wire(*option), data);
        }
        input.extend_from_slice(&garbage);
        let exports = if two { vec![export("a"), export("b")] } else { vec![export("a")] };
        let whole = serve(exports.clone(), &input, input.len());
        prop_assert_eq!(serve(exports, &input, piece), whole, "how bytes arrive makes no difference");
    }

    #[test]
    fn a_server_survives_garbage(input in prop::collection::vec(any::<u8>(), 0..100)) {
        let _ = serve(vec![export("a")], &input, 10);
    }

    #[test]
    fn a_client_survives_garbage(
        replies in prop::collection::vec((0_u32..12, 0_u32..14, prop::collection::vec(any::<u8>(), 0..40)), 0..12),
        headers in prop::sample::select(vec![Headers::Simple, Headers::Structured, Headers::Extended]),
    ) {
        let mut input = greeting(3);
        for (option, kind, data) in replies {
            let kind = if kind < 6 { kind } else { 1 << 31 | (kind - 5) };
            input.extend(reply(OptionCode::from_wire(option), kind, &data));
        }
        let _ = listen(&input, ClientAsk { headers, ..ClientAsk::new("a") });
        let mut client = Some(ListHandshake::new());
        let (mut at, mut output) = (0, Vec::new());
        while let Some(Ok(step)) = client.take().map(|client| client.step(&input[at..], &mut output)) {
            if let Step::Next { state, consumed } = step {
                at += consumed;
                client = Some(state);
            }
        }
    }
}
