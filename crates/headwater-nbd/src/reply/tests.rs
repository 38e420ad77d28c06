//! Tests of the reply codec.

use proptest::prelude::*;

use super::*;

const MAX_DATA: u32 = 1 << 20;

const FORMS: [ReplyTo; 2] = [
    ReplyTo { headers: Headers::Structured, cookie: 77, offset: 0 },
    ReplyTo { headers: Headers::Extended, cookie: 77, offset: 1 << 40 },
];

fn decode(bytes: &[u8]) -> (ChunkHeader, &[u8]) {
    decode_as(FORMS[0], bytes)
}

fn decode_as(to: ReplyTo, bytes: &[u8]) -> (ChunkHeader, &[u8]) {
    let (header, used) = ReplyHeader::decode(bytes, to.headers, MAX_DATA).unwrap().unwrap();
    assert_eq!(header.cookie(), 77);
    if let ReplyHeader::Chunk(chunk) = header {
        assert_eq!(chunk.to, to);
        assert_eq!(*chunk.encode(), bytes[..used]);
        for short in 0..used {
            assert_eq!(ReplyHeader::decode(&bytes[..short], to.headers, MAX_DATA), Ok(None));
        }
    }
    match header {
        ReplyHeader::Chunk(chunk) => (chunk, &bytes[used..]),
        ReplyHeader::Simple { .. } => panic!("expected a chunk"),
    }
}

#[test]
fn simple_replies_are_read_with_and_without_structured_ones() {
    let bytes = encode_simple(5, Some(ErrorCode::NoSpace));
    assert_eq!(&*bytes, b"\x67\x44\x66\x98\0\0\0\x1c\0\0\0\0\0\0\0\x05");
    for headers in [Headers::Simple, Headers::Structured] {
        let (header, used) = ReplyHeader::decode(&bytes, headers, MAX_DATA).unwrap().unwrap();
        assert_eq!(header, ReplyHeader::Simple { cookie: 5, error: Some(ErrorCode::NoSpace) });
        assert_eq!(used, ReplyHeader::SIMPLE_LEN);
        assert_eq!(ReplyHeader::decode(&bytes[..15], headers, MAX_DATA), Ok(None));
    }
    assert!(ReplyHeader::decode(&bytes, Headers::Extended, MAX_DATA).is_err());
}

#[test]
fn a_chunk_where_none_was_agreed_on_is_an_error() {
    let extended = ReplyTo { headers: Headers::Extended, ..1.into() };
    for (form, others) in [
        (ReplyTo::from(1), [Headers::Simple, Headers::Extended]),
        (extended, [Headers::Simple, Headers::Structured]),
    ] {
        for headers in others {
            assert!(ReplyHeader::decode(&encode_done(form), headers, MAX_DATA).is_err());
        }
    }
}

#[test]
fn the_layout_of_extended_chunks_is_that_of_the_protocol() {
    let bytes = encode_data_prefix(FORMS[1], 4096, 512, true);
    let expected = b"\x6e\x8a\x27\x8c\0\x01\0\x01\0\0\0\0\0\0\0\x4d\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x02\x08\0\0\0\0\0\0\x10\0";
    assert_eq!(&*bytes, expected);
    let mut bytes = Vec::new();
    encode_block_status(&mut bytes, FORMS[1], 3, &[StatusExtent { length: 1 << 40, flags: 2 }], true);
    assert_eq!(bytes[4..8], [0, 1, 0, 6]);
    assert_eq!(
        bytes[24..40],
        [&24_u64.to_be_bytes()[..], &3_u32.to_be_bytes(), &1_u32.to_be_bytes()].concat()
    );
    assert_eq!(bytes[40..], [(1_u64 << 40).to_be_bytes(), 2_u64.to_be_bytes()].concat());
}

#[test]
fn chunks_survive_the_wire() {
    FORMS.into_iter().for_each(survive);
}

fn survive(form: ReplyTo) {
    let decode = |bytes| decode_as(form, bytes);
    let bytes = encode_done(form);
    let (chunk, rest) = decode(&bytes);
    assert_eq!((chunk.kind, chunk.done, rest.len()), (ChunkKind::None, true, 0));

    let bytes = encode_data_prefix(form, 4096, 512, false);
    let (chunk, rest) = decode(&bytes);
    assert_eq!((chunk.kind, chunk.done, chunk.data_len()), (ChunkKind::OffsetData, false, 512));
    assert_eq!(decode_data_offset(rest.try_into().unwrap()), 4096);

    let bytes = encode_hole(form, 1 << 40, 65536, true);
    let (chunk, rest) = decode(&bytes);
    assert_eq!((chunk.kind, chunk.data_len(), rest.len()), (ChunkKind::OffsetHole, 0, chunk.length as usize));
    assert_eq!(decode_hole(rest), Ok((1 << 40, 65536)));

    let extents =
        [StatusExtent { length: 512, flags: STATE_HOLE | STATE_ZERO }, StatusExtent { length: 1, flags: 0 }];
    let mut bytes = Vec::new();
    encode_block_status(&mut bytes, form, 3, &extents, true);
    let (chunk, rest) = decode(&bytes);
    assert_eq!((chunk.kind, rest.len()), (ChunkKind::BlockStatus, chunk.length as usize));
    assert_eq!(decode_block_status(rest, form.headers), Ok((3, extents.to_vec())));

    let mut bytes = Vec::new();
    encode_error(&mut bytes, form, ErrorCode::Io, "the disk is\nbroken");
    let (chunk, rest) = decode(&bytes);
    assert_eq!((chunk.kind, rest.len()), (ChunkKind::Error, chunk.length as usize));
    let message = "the disk is\u{fffd}broken".to_owned();
    let expected = ErrorChunk { code: ErrorCode::Io, message, offset: None };
    assert_eq!(decode_error(chunk.kind, rest), Ok(expected));
}

#[test]
fn an_error_with_an_offset_is_read() {
    let payload = b"\0\0\0\x05\0\x02no\0\0\0\0\0\0\x10\0";
    let error = decode_error(ChunkKind::ErrorOffset, payload).unwrap();
    assert_eq!(error, ErrorChunk { code: ErrorCode::Io, message: "no".to_owned(), offset: Some(4096) });
    assert!(decode_error(ChunkKind::ErrorOffset, &payload[..15]).is_err());
    assert!(decode_error(ChunkKind::Error, b"\0\0\0\x05\0\x09no").is_err());
    assert!(decode_error(ChunkKind::Error, b"\0\0\0\0\0\0").is_err());
}

#[test]
fn what_is_sent_stays_within_what_is_accepted() {
    let mut bytes = Vec::new();
    encode_error(&mut bytes, 77, ErrorCode::Io, &"ü".repeat(5000));
    assert_eq!(decode(&bytes).0.length, 6 + 4096);
    for form in FORMS {
        let mut bytes = Vec::new();
        encode_block_status(&mut bytes, form, 0, &[StatusExtent { length: 1, flags: 0 }; 200_000], true);
        let (chunk, payload) = decode_as(form, &bytes);
        assert!(chunk.length <= MAX_CONTROL_PAYLOAD && payload.len() == chunk.length as usize);
        assert!(decode_block_status(payload, form.headers).is_ok());
    }
}

#[test]
fn impossible_chunks_are_refused() {
    let header = |kind: u16, length: u32| {
        let mut bytes = encode_done(77).to_vec();
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[16..].copy_from_slice(&length.to_be_bytes());
        ReplyHeader::decode(&bytes, Headers::Structured, MAX_DATA)
    };
    for (kind, length) in [
        (0, 1),
        (1, 8),
        (1, MAX_DATA + 9),
        (1, u32::MAX),
        (2, 11),
        (2, 13),
        (5, 11),
        (5, MAX_STATUS_PAYLOAD + 1),
        (0x8001, 5),
        (0x8002, 13),
        (0x8001, u32::MAX),
        (3, 0),
        (6, 100),
    ] {
        assert!(header(kind, length).is_err(), "type {kind} with {length} bytes");
    }
    assert!(header(1, MAX_DATA + 8).is_ok());
    assert!(header(0x8123, 6).is_ok(), "errors of unknown type are errors all the same");
    let header = |kind: u16, length: u64| {
        let mut bytes = encode_done(FORMS[1]).to_vec();
        bytes[6..8].copy_from_slice(&kind.to_be_bytes());
        bytes[24..].copy_from_slice(&length.to_be_bytes());
        ReplyHeader::decode(&bytes, Headers::Extended, MAX_DATA)
    };
    for (kind, length) in [
        (0, 1),
        (1, u64::from(MAX_DATA) + 9),
        (1, 1 << 32 | 9),
        (5, 12),
        (6, 23),
        (6, u64::from(MAX_EXTENDED_STATUS_PAYLOAD) + 1),
        (0x8001, u64::MAX),
        (7, 0),
    ] {
        assert!(header(kind, length).is_err(), "type {kind} with {length} bytes");
    }
    assert!(header(6, MAX_EXTENDED_STATUS_PAYLOAD.into()).is_ok());
}

#[test]
fn malformed_payloads_are_refused() {
    assert!(decode_hole(&[0; 12]).is_err(), "empty hole");
    assert!(decode_hole(&[1; 11]).is_err());
    let compact = |payload| decode_block_status(payload, Headers::Structured);
    assert!(compact(b"\0\0\0\x01").is_err(), "no extent");
    assert!(compact(b"\0\0\0\x01\0\0\0\x01\0\0\0").is_err(), "half an extent");
    assert!(compact(b"\0\0\0\x01\0\0\0\0\0\0\0\0").is_err(), "empty extent");
    let extended = |count: u32, extents: &[u64]| {
        let extents: Vec<u8> = extents.iter().flat_map(|field| field.to_be_bytes()).collect();
        let payload = [&1_u32.to_be_bytes()[..], &count.to_be_bytes(), &extents].concat();
        decode_block_status(&payload, Headers::Extended)
    };
    assert!(extended(1, &[512, 3]).is_ok());
    assert!(extended(0, &[]).is_err(), "no extent");
    assert!(extended(1, &[512]).is_err(), "half an extent");
    assert!(extended(1, &[0, 3]).is_err(), "empty extent");
    assert!(extended(2, &[512, 3]).is_err() && extended(1, &[512, 3, 1, 0]).is_err(), "another count");
    assert!(extended(1, &[512, 1 << 32]).is_err(), "unknown flags");
}

#[test]
fn coverage_demands_each_byte_once() {
    let mut coverage = ReadCoverage::new(1000, 100);
    assert!(coverage.finish().is_err());
    assert_eq!(coverage.answer(1040, 10).unwrap(), 40..50);
    assert_eq!(coverage.answer(1000, 40).unwrap(), 0..40);
    for (offset, length) in
        [(1000, 1), (1049, 2), (990, 20), (1090, 11), (1060, 0), (0, u32::MAX), (u64::MAX, 1)]
    {
        assert!(coverage.answer(offset, length).is_err(), "{length} at {offset}");
    }
    let error = coverage.finish().unwrap_err().to_string();
    assert!(error.contains("1050+1 was not answered"), "{error}");
    assert_eq!(coverage.answer(1060, 40).unwrap(), 60..100);
    assert!(!coverage.is_complete());
    assert_eq!(coverage.answer(1050, 10).unwrap(), 50..60);
    assert_eq!(coverage.finish(), Ok(()));
    assert!(ReadCoverage::new(5, 0).is_complete());
}

proptest! {
    /// Against the naive oracle: one flag per byte.
    #[test]
    fn coverage_agrees_with_a_bitmap(chunks in prop::collection::vec((0_u64..80, 0_u32..40), 0..40)) {
        let mut coverage = ReadCoverage::new(8, 64);
        let mut bitmap = [false; 64];
        for (offset, length) in chunks {
            let inside = offset >= 8 && offset + u64::from(length) <= 72 && length > 0;
            let bytes = (offset.saturating_sub(8) as usize)..(offset + u64::from(length)).saturating_sub(8) as usize;
            let fresh = inside && bitmap[bytes.clone()].iter().all(|answered| !answered);
            let answer = coverage.answer(offset, length);
            prop_assert_eq!(answer.is_ok(), fresh);
            if fresh {
                bitmap[bytes].fill(true);
            }
            prop_assert_eq!(coverage.is_complete(), bitmap.iter().all(|answered| *answered));
        }
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..64), magic in 0_usize..4) {
        let mut bytes = bytes;
        let magic = [wire::SIMPLE_REPLY, wire::CHUNK, wire::EXTENDED_CHUNK, 0][magic];
        if bytes.len() >= 4 && magic != 0 {
            bytes[..4].copy_from_slice(&magic.to_be_bytes());
        }
        for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
            let _ = decode_block_status(&bytes, headers);
            if let Ok(Some((_, used))) = ReplyHeader::decode(&bytes, headers, MAX_DATA) {
                prop_assert!(used <= bytes.len());
            }
        }
        let _ = decode_hole(&bytes);
        let _ = decode_error(ChunkKind::Error, &bytes);
        let _ = decode_error(ChunkKind::ErrorOffset, &bytes);
    }

    #[test]
    fn error_codes_survive_the_wire(code: u32) {
        prop_assert_eq!(ErrorCode::from_wire(code).map_or(0, ErrorCode::to_wire), code);
    }
}
