//! Tests of the way to TLS: who says what in clear, and what counts afterwards.

use super::*;

/// A client that wants TLS against a server of ours; TLS itself is left out.
fn talk_tls(rules: ServerRules) -> Result<ServerOffer, ProtocolError> {
    let exports = || vec![export("a")];
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    let mut server = ServerHandshake::new(rules, &mut to_client);
    let mut client = TlsHandshake::new(ClientAsk::new("a"));
    let (mut client, mut server) = loop {
        client = match client.step(&to_client, &mut to_server)? {
            Step::Done { .. } => panic!("the server has not started TLS"),
            Step::Next { state, consumed } => {
                to_client.drain(..consumed);
                state
            }
            Step::More { state, .. } => match server.step(exports, &to_server, &mut to_client)? {
                Step::Next { state: next, consumed } => {
                    to_server.drain(..consumed);
                    server = next;
                    state
                }
                Step::Done { outcome: ServerOutcome::StartTls(server), consumed } => {
                    assert_eq!(consumed, to_server.len());
                    to_server.clear();
                    let Step::Done { outcome, consumed } = state.step(&to_client, &mut to_server)? else {
                        panic!("the client is asked to start TLS")
                    };
                    assert_eq!((consumed, to_server.len()), (to_client.len(), 0));
                    to_client.clear();
                    break (outcome, *server);
                }
                other => panic!("{other:?}"),
            },
        };
    };
    loop {
        client = match client.step(&to_client, &mut to_server)? {
            Step::Done { outcome, .. } => return Ok(outcome),
            Step::Next { state, consumed } => {
                to_client.drain(..consumed);
                state
            }
            Step::More { state, .. } => {
                match server.clone().step(exports, &to_server, &mut to_client)? {
                    Step::Next { state: next, consumed } => {
                        to_server.drain(..consumed);
                        server = next;
                    }
                    Step::Done { outcome: ServerOutcome::Transmission(_), .. } => {}
                    other => panic!("{other:?}"),
                }
                state
            }
        };
    }
}

#[test]
fn with_tls_both_go_on_as_they_would_without() {
    let demanding = ServerRules { tls: true, ..LENIENT };
    let plain = talk(vec![export("a")], ClientAsk::new("a")).unwrap().0;
    assert_eq!(talk_tls(demanding).unwrap(), plain);
    // A client that wants TLS does without the server rather than without TLS.
    let refused = talk_tls(LENIENT).unwrap_err();
    assert!(
        matches!(
            refused,
            ProtocolError::Refused { option: OptionCode::StartTls, refusal: OptionRefusal::Policy, .. }
        ),
        "{refused}"
    );
}

#[test]
fn a_client_that_wants_tls_takes_nothing_else() {
    let listen = |input: &[u8]| {
        let (mut client, mut at) = (TlsHandshake::new(ClientAsk::new("secret")), 0);
        let mut said = Vec::new();
        let end = loop {
            match client.step(&input[at..], &mut said) {
                Ok(Step::Next { state, consumed }) => {
                    at += consumed;
                    client = state;
                }
                Ok(Step::More { state, .. }) => break state.closed(),
                Ok(Step::Done { .. }) => panic!("there was no consent"),
                Err(error) => break error,
            }
        };
        assert!(!said.windows(6).any(|word| word == b"secret"), "the export's name is not said in clear");
        end.to_string()
    };
    assert!(listen(&greeting(0)).contains("cannot start TLS"));
    assert!(listen(&greeting(3)).contains("when TLS was asked for"));
    assert!(listen(b"").contains("before the server's greeting"));
    let ack = |option| [greeting(3), reply(option, REP_ACK, b"")].concat();
    assert!(listen(&ack(OptionCode::Go)).contains("expected NBD_OPT_STARTTLS"));
    let info = [greeting(3), reply(OptionCode::StartTls, REP_INFO, &[0; 12])].concat();
    assert!(listen(&info).contains("does not belong"));
    let unsupported = reply(OptionCode::StartTls, OptionRefusal::Unsupported.to_wire(), b"");
    assert!(listen(&[greeting(3), unsupported].concat()).contains("does not support it"));
}

/// What a server that demands TLS answers in clear.
fn in_clear(options: &[(OptionCode, &[u8])]) -> (Vec<u8>, Result<Option<ServerOutcome>, ProtocolError>) {
    let input = client_bytes(FIXED_NEWSTYLE, options);
    let mut output = Vec::new();
    let mut server = ServerHandshake::new(ServerRules { tls: true, ..LENIENT }, &mut output);
    let (mut at, exports) = (0, || -> Vec<ExportInfo> { panic!("nobody looks at exports before TLS") });
    loop {
        match server.step(exports, &input[at..], &mut output) {
            Ok(Step::Done { outcome, .. }) => return (output, Ok(Some(outcome))),
            Ok(Step::Next { state, consumed }) => {
                at += consumed;
                server = state;
            }
            Ok(Step::More { .. }) => return (output, Ok(None)),
            Err(error) => return (output, Err(error)),
        }
    }
}

#[test]
fn a_server_that_demands_tls_says_nothing_in_clear() {
    let go = named("a", &[0, 0]);
    let big = vec![0; MAX_OPTION as usize + 1];
    let (output, outcome) = in_clear(&[
        (OptionCode::List, b""),
        (OptionCode::Go, &go),
        (OptionCode::Info, &go),
        (OptionCode::StructuredReply, b""),
        (OptionCode::SetMetaContext, &named("a", &[0; 4])),
        (OptionCode::ListMetaContext, &named("a", &[0; 4])),
        (OptionCode::Other(99), &big),
        (OptionCode::Abort, b""),
    ]);
    assert_eq!(outcome, Ok(Some(ServerOutcome::Closed)));
    let kinds: Vec<_> = replies(&output).into_iter().map(|(_, kind, _)| kind).collect();
    let required = OptionRefusal::TlsRequired.to_wire();
    assert_eq!(kinds, [&[required; 7][..], &[REP_ACK]].concat());
    // There is no way to refuse this one.
    let (output, outcome) = in_clear(&[(OptionCode::ExportName, b"a")]);
    assert_eq!((output.len(), outcome), (GREETING_LEN, Ok(Some(ServerOutcome::Closed))));
}

#[test]
fn what_is_said_in_clear_behind_starttls_is_no_part_of_the_session() {
    for options in [
        &[(OptionCode::StartTls, &b""[..]), (OptionCode::StructuredReply, b"")][..],
        &[(OptionCode::StartTls, b"x")],
    ] {
        let (output, outcome) = in_clear(options);
        assert!(matches!(outcome, Err(ProtocolError::Malformed { .. })), "{outcome:?}");
        assert_eq!(output.len(), GREETING_LEN);
    }
    // Nothing that was negotiated before counts after it.
    let (_, outcome) = in_clear(&[(OptionCode::StructuredReply, b""), (OptionCode::StartTls, b"")]);
    let Ok(Some(ServerOutcome::StartTls(server))) = outcome else { panic!("{outcome:?}") };
    let mut input = Vec::new();
    encode_option(&mut input, OptionCode::StartTls, b"");
    let mut output = Vec::new();
    let Step::Next { state, consumed } = server.step(Vec::new, &input, &mut output).unwrap() else {
        panic!("it is refused")
    };
    assert_eq!(consumed, input.len());
    assert_eq!(output[12..16], OptionRefusal::Invalid.to_wire().to_be_bytes(), "TLS is in use already");
    input.clear();
    encode_option(&mut input, OptionCode::StructuredReply, b"");
    output.clear();
    state.step(Vec::new, &input, &mut output).unwrap();
    assert_eq!(output[12..16], REP_ACK.to_be_bytes(), "it was not agreed on before");
}

proptest! {
    #[test]
    fn neither_side_of_the_way_to_tls_is_upset_by_garbage(
        options in prop::collection::vec(any_option(), 0..6),
        answers in prop::collection::vec((0_u32..12, 0_u32..14, prop::collection::vec(any::<u8>(), 0..40)), 0..4),
        garbage in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let options: Vec<_> = options.iter().map(|(code, data)| (OptionCode::from_wire(*code), &data[..])).collect();
        let (output, _) = in_clear(&options);
        for (_, kind, _) in replies(&output) {
            prop_assert!(kind == REP_ACK || kind == OptionRefusal::TlsRequired.to_wire(), "{kind}");
        }
        let mut input = greeting(3);
        for (option, kind, data) in answers {
            input.extend(reply(OptionCode::from_wire(option), kind, &data));
        }
        input.extend(garbage);
        let mut client = Some(TlsHandshake::new(ClientAsk::new("a")));
        let (mut at, mut output) = (0, Vec::new());
        while let Some(Ok(step)) = client.take().map(|client| client.step(&input[at..], &mut output)) {
            if let Step::Next { state, consumed } = step {
                at += consumed;
                client = Some(state);
            }
        }
    }
}

#[test]
fn a_client_in_clear_is_not_listened_to_for_long() {
    for option in [OptionCode::Abort, OptionCode::Go, OptionCode::Other(99)] {
        let mut output = Vec::new();
        let server = ServerHandshake::new(ServerRules { tls: true, ..LENIENT }, &mut output);
        let no_exports = || -> Vec<ExportInfo> { panic!("nothing is said of exports in clear") };
        let Ok(Step::Next { state, .. }) =
            server.step(no_exports, &FIXED_NEWSTYLE.to_be_bytes(), &mut output)
        else {
            panic!("flags are taken")
        };
        // The head of an option whose data are longer than what is kept of any.
        let head =
            [&b"IHAVEOPT"[..], &option.to_wire().to_be_bytes(), &(MAX_OPTION + 1).to_be_bytes()].concat();
        match state.step(no_exports, &head, &mut output) {
            Ok(Step::Next { consumed, .. }) => assert_eq!(consumed, head.len(), "{option}"),
            other => panic!("{option}: the data are waited for: {other:?}"),
        }
    }
}
