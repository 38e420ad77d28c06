//! Tests of the request codec.

use proptest::prelude::*;

use super::*;

const SIZE: u64 = 1 << 20;

fn terms() -> Terms {
    use TransmissionFlags as F;
    let offered = [F::HAS_FLAGS, F::SEND_FLUSH, F::SEND_FUA, F::SEND_TRIM, F::SEND_WRITE_ZEROES, F::SEND_DF];
    let flags = offered.into_iter().chain([F::SEND_CACHE, F::SEND_FAST_ZERO]).fold(F::NONE, F::union);
    let (minimum_block, maximum_payload) = (512, 64 << 10);
    let headers = Headers::Structured;
    Terms { size: SIZE, flags, minimum_block, maximum_payload, headers, contexts: true }
}

/// With extended headers, as a server has them that takes status requests with a payload.
fn extended() -> Terms {
    let flags = terms().flags | TransmissionFlags::BLOCK_STATUS_PAYLOAD;
    Terms { headers: Headers::Extended, flags, ..terms() }
}

fn check(command: Command, flags: CommandFlags, offset: u64, length: u64) -> Result<(), ErrorCode> {
    Request::new(command, 7, offset, length).with_flags(flags).check(&terms())
}

#[test]
fn the_layout_is_that_of_the_protocol() {
    let request =
        Request::new(Command::Write, 0x0102_0304_0506_0708, 0x1000, 0x200).with_flags(CommandFlags::FUA);
    let expected =
        b"\x25\x60\x95\x13\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x10\0\0\0\x02\0";
    assert_eq!(&*request.encode(Headers::Structured), expected);
    assert_eq!(request.payload_len(&terms()), Ok(0x200));
    assert_eq!(Request { command: Command::Read, ..request }.payload_len(&terms()), Ok(0));
    let expected =
        b"\x21\xe4\x1c\x71\0\x21\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x02\0";
    assert_eq!(&*request.encode(Headers::Extended), expected);
    assert_eq!(request.payload_len(&extended()), Ok(0x200), "also where it isn't said");
}

#[test]
fn requests_within_the_terms_pass() {
    use CommandFlags as F;
    for (command, flags) in [
        (Command::Read, F::DF),
        (Command::Read, F::FUA),
        (Command::Write, F::FUA),
        (Command::Trim, F::NONE),
        (Command::Cache, F::NONE),
        (Command::WriteZeroes, F::NO_HOLE | F::FAST_ZERO | F::FUA),
        (Command::BlockStatus, F::REQ_ONE),
    ] {
        assert_eq!(check(command, flags, SIZE - 512, 512), Ok(()), "{command:?}");
    }
    assert_eq!(check(Command::Flush, F::NONE, 0, 0), Ok(()));
    assert_eq!(check(Command::Read, F::NONE, SIZE, 0), Ok(()), "an empty read has no effect");
    // These carry no payload and may be longer than the longest payload.
    assert_eq!(check(Command::WriteZeroes, F::NONE, 0, SIZE), Ok(()));
    assert_eq!(check(Command::BlockStatus, F::NONE, 0, SIZE), Ok(()));
}

#[test]
fn bounds_have_the_errors_of_the_protocol_document() {
    use CommandFlags as F;
    let end = SIZE - 512;
    for (command, expected) in [
        (Command::Read, ErrorCode::Invalid),
        (Command::Trim, ErrorCode::Invalid),
        (Command::Cache, ErrorCode::Invalid),
        (Command::BlockStatus, ErrorCode::Invalid),
        (Command::Write, ErrorCode::NoSpace),
        (Command::WriteZeroes, ErrorCode::NoSpace),
    ] {
        assert_eq!(check(command, F::NONE, end, 1024), Err(expected), "{command:?}");
        assert_eq!(check(command, F::NONE, u64::MAX - 511, 1024), Err(expected), "{command:?}");
        assert_eq!(check(command, F::NONE, 1, 512), Err(ErrorCode::Invalid), "{command:?} misaligned");
        assert_eq!(check(command, F::NONE, 0, 513), Err(ErrorCode::Invalid), "{command:?} misaligned");
    }
    assert_eq!(check(Command::Read, F::NONE, 0, (64 << 10) + 512), Err(ErrorCode::Invalid));
    assert_eq!(check(Command::Read, F::DF, 0, (64 << 10) + 512), Err(ErrorCode::Overflow));
    assert_eq!(check(Command::Write, F::NONE, 0, (64 << 10) + 512), Err(ErrorCode::Invalid));
    assert_eq!(check(Command::BlockStatus, F::NONE, 0, 0), Err(ErrorCode::Invalid));
}

#[test]
fn flags_and_commands_that_were_not_offered_are_invalid() {
    use CommandFlags as F;
    for (command, flags) in [
        (Command::Other(8), F::NONE),
        (Command::Read, F::NO_HOLE),
        (Command::Write, F::DF),
        (Command::Trim, F::FAST_ZERO),
        (Command::BlockStatus, F::NO_HOLE),
        (Command::Read, F::from_bits(1 << 5)),
        (Command::Flush, F::from_bits(1 << 15)),
    ] {
        assert_eq!(check(command, flags, 0, 512), Err(ErrorCode::Invalid), "{command:?} {flags:?}");
    }
    let nothing = Terms { flags: TransmissionFlags::HAS_FLAGS, contexts: false, ..terms() };
    for command in [Command::Flush, Command::Trim, Command::Cache, Command::WriteZeroes, Command::BlockStatus]
    {
        assert_eq!(Request::new(command, 1, 0, 512).check(&nothing), Err(ErrorCode::Invalid), "{command:?}");
    }
    for (command, flags) in [(Command::Read, F::DF), (Command::Write, F::FUA)] {
        let request = Request::new(command, 1, 0, 512).with_flags(flags);
        assert_eq!(request.check(&nothing), Err(ErrorCode::Invalid), "{command:?}");
    }
}

#[test]
fn a_read_only_export_refuses_changes_as_not_permitted() {
    let terms = Terms { flags: TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY, ..terms() };
    for command in [Command::Write, Command::WriteZeroes, Command::Trim] {
        assert_eq!(Request::new(command, 1, 0, 512).check(&terms), Err(ErrorCode::Permission));
    }
    assert_eq!(Request::new(Command::Read, 1, 0, 512).check(&terms), Ok(()));
}

#[test]
fn extended_requests_say_what_follows_and_for_how_much_they_are() {
    use CommandFlags as F;
    let check = |command, flags, length| {
        let request = Request::new(command, 7, 0, length).with_flags(flags);
        (request.payload_len(&extended()).ok(), request.check(&extended()))
    };
    let invalid = Err(ErrorCode::Invalid);
    assert_eq!(check(Command::Write, F::PAYLOAD_LEN | F::FUA, 512), (Some(512), Ok(())));
    assert_eq!(check(Command::Write, F::NONE, 512), (Some(512), Ok(())), "as QEMU's client sends it");
    assert_eq!(check(Command::Write, F::NONE, 1 << 40).0, None);
    assert_eq!(check(Command::Write, F::PAYLOAD_LEN, 64 << 10), (Some(64 << 10), Ok(())));
    assert_eq!(check(Command::Write, F::PAYLOAD_LEN, (64 << 10) + 512).0, None, "longer than it was told");
    assert_eq!(check(Command::Trim, F::PAYLOAD_LEN, u64::MAX).0, None, "nobody waits for that");
    for command in [Command::Read, Command::Trim, Command::Flush, Command::WriteZeroes, Command::Other(9)] {
        assert_eq!(check(command, F::PAYLOAD_LEN, 512), (Some(512), invalid), "{command:?}: skipped");
    }
    let huge = Terms { size: 1 << 62, ..extended() };
    for command in [Command::WriteZeroes, Command::Trim, Command::Cache, Command::BlockStatus] {
        assert_eq!(Request::new(command, 7, 0, 1 << 62).check(&huge), Ok(()), "{command:?}");
        assert!(Request::new(command, 7, 512, 1 << 62).check(&huge).is_err(), "{command:?}");
        assert!(Request::new(command, 7, 512, u64::MAX - 511).check(&huge).is_err(), "{command:?}");
    }
}

#[test]
fn a_status_request_may_choose_contexts() {
    let request =
        |length| Request::new(Command::BlockStatus, 7, 1024, length).with_flags(CommandFlags::PAYLOAD_LEN);
    assert_eq!(request(16).check(&extended()), Ok(()));
    let unwilling = Terms { flags: terms().flags, ..extended() };
    assert_eq!(request(16).check(&unwilling), Err(ErrorCode::Invalid));
    let decode = |length: u64, ids: &[u8]| {
        let payload = [&length.to_be_bytes()[..], ids].concat();
        StatusFilter::decode(&request(payload.len() as u64), &payload, |id| id < 2, &extended())
    };
    let filter = decode(4096, &[0, 0, 0, 1, 0, 0, 0, 0]).unwrap();
    assert_eq!(filter.request, Request::new(Command::BlockStatus, 7, 1024, 4096));
    assert_eq!(filter.contexts, [1, 0]);
    for (length, ids) in [
        (4096, &[][..]),
        (4096, &[0, 0, 0]),
        (4096, &[0, 0, 0, 2]),
        (4096, &[0, 0, 0, 1, 0, 0, 0, 1]),
        (0, &[0, 0, 0, 1]),
        (SIZE, &[0, 0, 0, 1]),
        (u64::MAX, &[0, 0, 0, 1]),
    ] {
        assert_eq!(decode(length, ids), Err(ErrorCode::Invalid), "{length} {ids:?}");
    }
    assert!(StatusFilter::decode(&request(3), &[0; 3], |_| true, &extended()).is_err());
}

proptest! {
    #[test]
    fn every_request_survives_the_wire(flags: u16, code: u16, cookie: u64, offset: u64, length: u32, more: u32) {
        let (flags, command) = (CommandFlags::from_bits(flags), Command::from_wire(code));
        for terms in [terms(), extended()] {
            let wide = if terms.headers.are_extended() { u64::from(more) << 32 } else { 0 };
            let mut request = Request { command, flags, cookie, offset, length: u64::from(length) | wide };
            if terms.headers.are_extended() && command == Command::Write {
                request.flags |= CommandFlags::PAYLOAD_LEN;
            }
            let bytes = request.encode(terms.headers);
            prop_assert_eq!(bytes.len(), Request::len_of(terms.headers));
            prop_assert_eq!(Request::decode(&bytes, terms.headers), Ok(Some(request)));
            for short in 0..bytes.len() {
                prop_assert_eq!(Request::decode(&bytes[..short], terms.headers), Ok(None));
            }
            // The verdict on any request is an answer, not a panic; what passes is inside the disk.
            let filtered = command == Command::BlockStatus && request.flags.contains(CommandFlags::PAYLOAD_LEN);
            let rangeless = filtered || matches!(command, Command::Flush | Command::Disconnect);
            if request.check(&terms).is_ok() && !rangeless {
                prop_assert!(request.end().is_some_and(|end| end <= SIZE));
            }
        }
    }

    #[test]
    fn garbage_is_refused(bytes: [u8; Request::LEN]) {
        prop_assume!(bytes[..4] != wire::REQUEST.to_be_bytes());
        prop_assert!(Request::decode(&bytes, Headers::Structured).is_err());
        prop_assume!(bytes[..4] != wire::EXTENDED_REQUEST.to_be_bytes());
        prop_assert!(Request::decode(&bytes, Headers::Extended).is_err());
    }
}
