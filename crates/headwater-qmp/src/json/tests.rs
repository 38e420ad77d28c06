//! What the comparison with QEMU's program (`tests/against_qemu`) doesn't reach: pieces, limits, time, round trips.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

/// Every value and error in `pieces`.
fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Result<Value, SyntaxError>> {
    let mut reader = Reader::new();
    let mut values = Vec::new();
    for piece in pieces {
        reader.push(piece);
        while let Some(value) = reader.next() {
            values.push(value);
        }
    }
    while let Some(value) = reader.finish() {
        values.push(value);
    }
    values
}

fn compact(value: &Value) -> String {
    String::from_utf8(encode(value, Style::Compact)).expect("ASCII")
}

fn parse_error(why: &str) -> SyntaxError {
    SyntaxError::Parse(why.to_owned())
}

#[test]
fn values_need_nothing_between_them() {
    let values = read([b"{'a':1}[true,false,null]\"x\"'y' -1 2.5".as_slice()]);
    let expected =
        [json!({ "a": 1 }), json!([true, false, null]), json!("x"), json!("y"), json!(-1), json!(2.5)];
    assert_eq!(values, expected.map(Ok));
}

#[test]
fn a_number_ends_at_the_next_byte_or_the_end() {
    let mut reader = Reader::new();
    reader.push(b"12");
    assert_eq!(reader.next(), None);
    reader.push(b"3");
    assert_eq!(reader.next(), None);
    assert_eq!(reader.finish(), Some(Ok(json!(123))));
    assert_eq!(reader.finish(), None);
}

#[test]
fn an_error_is_reported_once_and_reading_goes_on() {
    let values = read([b"{\"a\" 1, foo} * rest of the line\n{\"b\":2}".as_slice()]);
    let expected =
        [Err(parse_error("missing : in object pair")), Err(parse_error("stray '*'")), Ok(json!({ "b": 2 }))];
    assert_eq!(values, expected);
}

#[test]
fn a_double_that_is_infinite_is_refused() {
    // QEMU takes it, and answers with an id that is no JSON.
    let values = read([b"{\"id\":1e999} {\"id\":-1e999} {\"id\":1e308}".as_slice()]);
    let error = || Err(parse_error("number out of range"));
    assert_eq!(values, [error(), error(), Ok(json!({ "id": 1e308 }))]);
}

#[test]
fn one_value_from_a_text() {
    assert_eq!(from_text(" {'a': 1} "), Ok(json!({ "a": 1 })));
    assert_eq!(from_text(""), Err(SyntaxError::Empty));
    assert_eq!(from_text("1 2"), Err(SyntaxError::Several));
    assert_eq!(from_text("{\"a\":"), Err(parse_error("premature EOI")));
    assert_eq!(from_text("\"a"), Err(parse_error("stray '\"a'")));
}

#[test]
fn limits() {
    let nested = "[".repeat(1_000_000);
    let values = read([nested.as_bytes()]);
    assert_eq!(values[0], Err(SyntaxError::Nesting));

    let items = format!("[{}", "1,".repeat(MAX_TOKENS / 2 + 1));
    assert_eq!(read([items.as_bytes()])[0], Err(SyntaxError::Tokens));

    let open = vec![b'x'; MAX_MESSAGE];
    assert_eq!(read([b"\"".as_slice(), &open])[0], Err(SyntaxError::Size));
    let value = [b"\"".as_slice(), &open[2..], b"\""].concat();
    assert_eq!(read([value.as_slice()]).len(), 1);
    assert!(read([value.as_slice()])[0].is_ok());

    let mut reader = Reader::new();
    let item = format!("\"{}\",", "x".repeat(1000));
    let piece = format!("[{}", item.repeat(MAX_MESSAGE / 1000));
    reader.push(piece.as_bytes());
    assert_eq!(reader.next(), Some(Err(SyntaxError::Size)));
}

/// A quadratic reader would take minutes.
#[test]
fn time_is_linear_in_the_bytes() {
    let command =
        br#"{"execute":"block-job-set-speed","arguments":{"device":"job0","speed":1048576},"id":17}"#;
    let burst = command.repeat(20_000);
    #[expect(clippy::disallowed_methods, reason = "the test is about real time")]
    let now = std::time::Instant::now;
    let start = now();
    assert_eq!(read([burst.as_slice()]).len(), 20_000);
    assert_eq!(read(burst.chunks(1)).len(), 20_000);
    let long = [b"\"".as_slice(), &vec![b'x'; 4 << 20], b"\""].concat();
    assert_eq!(read(long.chunks(1)).len(), 1);
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
}

#[test]
fn encoding() {
    let value =
        json!({ "a": [], "b": {}, "c": [1, "é\u{1f600}\"\\\n\u{7f}\0/"], "d": 0.1, "e": -0.0, "f": 1e300 });
    let text = r#"{"a": [], "b": {}, "c": [1, "\u00E9\uD83D\uDE00\"\\\n\u007F\u0000/"], "d": 0.10000000000000001, "e": -0, "f": 1.0000000000000001e+300}"#;
    assert_eq!(compact(&value), format!("{text}\r\n"));
    let pretty = String::from_utf8(encode(&json!({ "a": [], "b": [{}, 1] }), Style::Pretty)).expect("ASCII");
    let lines = [
        "{",
        "    \"a\": [",
        "    ],",
        "    \"b\": [",
        "        {",
        "        },",
        "        1",
        "    ]",
        "}",
        "",
    ];
    assert_eq!(pretty, lines.join("\r\n"));
}

fn any_value() -> impl Strategy<Value = Value> {
    // Noncharacters are written and not read back, as in QEMU.
    let text = || "\\PC{0,8}|[ -~]{0,8}|[\\x00-\\x1f]{1,3}";
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        proptest::num::f64::NORMAL.prop_map(Value::from),
        text().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            proptest::collection::vec((text(), inner), 0..5)
                .prop_map(|members| Value::Object(members.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// An integral double is written without a fraction, so that it comes back as an integer.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.0 == b.0 && same(a.1, b.1))
        }
        (Value::Number(a), Value::Number(b)) => a == b || (a.is_f64() && a.as_f64() == b.as_f64()),
        _ => a == b,
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(value in any_value(), pretty: bool) {
        let style = if pretty { Style::Pretty } else { Style::Compact };
        let bytes = encode(&value, style);
        let values = read([bytes.as_slice()]);
        prop_assert_eq!(values.len(), 1);
        let read = values[0].as_ref().expect("it is JSON");
        prop_assert!(same(&value, read), "{} became {}", value, read);
        prop_assert!(serde_json::from_slice::<Value>(&bytes).is_ok(), "others understand it as well");
    }

    #[test]
    fn pieces_do_not_matter(bytes in proptest::collection::vec(any::<u8>(), 0..200), size in 1_usize..9) {
        prop_assert_eq!(read([bytes.as_slice()]), read(bytes.chunks(size)));
    }

    #[test]
    fn brackets_and_quotes(text in "[\\[\\]{}:,\"'a1\\\\ \n]{0,60}", size in 1_usize..9) {
        prop_assert_eq!(read([text.as_bytes()]), read(text.as_bytes().chunks(size)));
    }
}
