//! Tests of the request codec.

use proptest::prelude::*;

use super::*;

const SIZE: u64 = 1 << 20;

fn terms() -> Terms {
    use TransmissionFlags as F;
    let offered = [F::HAS_FLAGS, F::SEND_FLUSH, F::SEND_FUA, F::SEND_TRIM, F::SEND_WRITE_ZEROES, F::SEND_DF];
    let flags = offered.into_iter().chain([F::SEND_CACHE, F::SEND_FAST_ZERO]).fold(F::NONE, F::union);
    let (minimum_block, maximum_payload) = (512, 64 << 10);
    Terms { size: SIZE, flags, minimum_block, maximum_payload, structured: true, contexts: true }
}

fn check(command: Command, flags: CommandFlags, offset: u64, length: u32) -> Result<(), ErrorCode> {
    Request::new(command, 7, offset, length).with_flags(flags).check(&terms())
}

#[test]
fn the_layout_is_that_of_the_protocol() {
    let request =
        Request::new(Command::Write, 0x0102_0304_0506_0708, 0x1000, 0x200).with_flags(CommandFlags::FUA);
    let expected =
        b"\x25\x60\x95\x13\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x10\0\0\0\x02\0";
    assert_eq!(&request.encode(), expected);
    assert_eq!(request.payload_len(), 0x200);
    assert_eq!(Request { command: Command::Read, ..request }.payload_len(), 0);
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
    assert_eq!(check(Command::WriteZeroes, F::NONE, 0, SIZE as u32), Ok(()));
    assert_eq!(check(Command::BlockStatus, F::NONE, 0, SIZE as u32), Ok(()));
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

proptest! {
    #[test]
    fn every_request_survives_the_wire(flags: u16, code: u16, cookie: u64, offset: u64, length: u32) {
        let (flags, command) = (CommandFlags::from_bits(flags), Command::from_wire(code));
        let request = Request { command, flags, cookie, offset, length };
        let bytes = request.encode();
        prop_assert_eq!(Request::decode(&bytes), Ok(Some(request)));
        for short in 0..Request::LEN {
            prop_assert_eq!(Request::decode(&bytes[..short]), Ok(None));
        }
        // The verdict on any request is an answer, not a panic; what passes is inside the disk.
        if request.check(&terms()).is_ok() && !matches!(command, Command::Flush | Command::Disconnect) {
            prop_assert!(request.end().is_some_and(|end| end <= SIZE));
        }
    }

    #[test]
    fn garbage_is_refused(bytes: [u8; Request::LEN]) {
        prop_assume!(bytes[..4] != wire::REQUEST.to_be_bytes());
        prop_assert!(Request::decode(&bytes).is_err());
    }
}
