//! Tests of what a disk's answers become on the wire.

use headwater_block::Error;

use super::*;

fn extent(len: u64, kind: ExtentKind, depth: u32) -> Extent {
    Extent { depth, ..Extent::new(0, len, kind) }
}

#[test]
fn extents_of_one_state_become_one() {
    let placed = Extent { host_offset: Some(65536), ..extent(4096, ExtentKind::Zero, 0) };
    let extents = [
        extent(4096, ExtentKind::Data, 0),
        Extent { host_offset: Some(0), ..extent(8192, ExtentKind::Data, 2) },
        placed,
        extent(4096, ExtentKind::Zero, 0),
        extent(1 << 31, ExtentKind::Unallocated, 3),
    ];
    let pairs = |state| merge(&extents, state).iter().map(|run| (run.length, run.flags)).collect::<Vec<_>>();
    let both = STATE_HOLE | STATE_ZERO;
    assert_eq!(pairs(allocation), [(12288, 0), (4096, STATE_ZERO), (4096 + (1 << 31), both)]);
    assert_eq!(pairs(depth), [(4096, 1), (8192, 3), (8192, 1), (1 << 31, 0)]);
}

#[test]
fn errors_have_the_codes_that_the_protocol_gives_them() {
    let fast = CommandFlags::FAST_ZERO;
    for (command, flags, kind, expected) in [
        (Command::Write, CommandFlags::NONE, ErrorKind::NoSpace, ErrorCode::NoSpace),
        (Command::Write, CommandFlags::NONE, ErrorKind::OutOfRange, ErrorCode::NoSpace),
        (Command::Read, CommandFlags::NONE, ErrorKind::OutOfRange, ErrorCode::Invalid),
        (Command::Trim, CommandFlags::NONE, ErrorKind::ReadOnly, ErrorCode::Permission),
        (Command::WriteZeroes, fast, ErrorKind::Unsupported, ErrorCode::NotSupported),
        (Command::WriteZeroes, CommandFlags::NONE, ErrorKind::Unsupported, ErrorCode::Invalid),
        (Command::Read, CommandFlags::NONE, ErrorKind::Unavailable, ErrorCode::Io),
        (Command::Read, CommandFlags::NONE, ErrorKind::Corrupt, ErrorCode::Io),
        (Command::Flush, CommandFlags::NONE, ErrorKind::Closed, ErrorCode::Io),
    ] {
        let request = Request::new(command, 1, 0, 512).with_flags(flags);
        assert_eq!(error_code(&request, &Error::new(kind, "")), expected, "{command:?} {kind:?}");
    }
}
