//! Streams of bytes, most of them garbage, are answered with the same messages, byte for byte.

use std::cell::RefCell;

use headwater_qmp::message::VersionTriple;
use headwater_qmp::{Greeting, Reader, Request, Response, Style, Version, encode, error::QmpError, schema};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::json;

use crate::daemon::Daemon;

/// Resets the reader, whatever state it is in, and asks for an answer that shows where the stream ended.
const END: &[u8] = b"\xff\n{\"execute\":\"end\",\"id\":\"end\"}\n";

fn our_answers(stream: &[u8]) -> Vec<String> {
    let mut reader = Reader::new();
    reader.push(stream);
    reader.push(END);
    let mut answers = Vec::new();
    while let Some(value) = reader.next() {
        let response = match value.map(Request::parse) {
            Err(error) => Response::failure(error, None),
            Ok(Err(bad)) => Response::failure(bad.error, bad.id),
            Ok(Ok(request)) => {
                let error = match schema::check_command(&request.execute, request.arguments) {
                    Err(error) => error,
                    Ok(_) => QmpError::generic("this was to be wrong"),
                };
                Response::failure(error, request.id)
            }
        };
        answers.push(String::from_utf8(encode(&response, Style::Compact)).expect("ASCII"));
    }
    answers
}

fn their_answers(daemon: &mut Daemon, stream: &[u8]) -> Vec<String> {
    daemon.send(stream);
    daemon.send(END);
    let mut answers = Vec::new();
    loop {
        answers.push(String::from_utf8(daemon.message()).expect("ASCII"));
        if answers.last().is_some_and(|answer| answer.starts_with("{\"id\": \"end\"")) {
            return answers;
        }
    }
}

#[test]
fn chosen_streams() {
    let streams: &[&[u8]] = &[
        b"foo ",
        b"nul ",
        b"true false null ",
        b"tr_ue []",
        b"tr-ue []",
        b"True []",
        b"a\xc3\xa9 []",
        b"tru\xff[]",
        b"]",
        b"{]",
        b"{]}",
        b"[}",
        b"]]]",
        b"[[[}",
        b"{[}]",
        b":",
        b",",
        b"{:}",
        b"{,}",
        b"[,]",
        b"{\"a\":1,}",
        b"[1,]",
        b"{\"a\"}",
        b"{\"a\":}",
        b"{\"a\" 1}",
        b"{1:2}",
        b"{{}:1}",
        b"{[1 2]:3}",
        b"{\"a\":1 \"b\":2}",
        b"[1 2]",
        b"{\"a\":[1}]",
        b"{\"a\":foo, \"b\"}",
        b"{\"b\" foo}",
        b"{\"a\":1,2:3}",
        b"{\"id\":1,\"id\":2}",
        b"{\"a\":1}{\"execute\":\"x\"}",
        b"{'execute': 'x'}",
        b"'it\\'s' '\"' \"\\'\" ",
        b"\x01[]",
        b"\x00[]",
        b"\x7f[]",
        b"\xc0[]",
        b"\xfe[]",
        b"\xef\xbb\xbf[]",
        b"* * []",
        b"*\n* []",
        b"*\r* []",
        b"*\t* []",
        b"*\x01\xff []",
        b"*\x1f*\n[]",
        b"*\"{\"[]\n",
        b"/a []",
        b"%d []",
        b"{\"a\":%d}",
        b"\"%d\" ",
        b"\"a\nb\"\n",
        b"\"a\tb\"\n",
        b"\"\\\x01\"[]",
        b"\"\\\n[]",
        b"\"\\x\"",
        b"\"\\u12\"",
        b"\"\\u12xy\" ",
        b"\"\\ud800\"",
        b"\"\\udc00\"",
        b"\"\\ud800\\u0041\"",
        b"\"\\ud83d\\ude0\"",
        b"\"\\uD83D\\uDBFF\"",
        b"\"\\ud83f\\udfff\"",
        b"\"\\uffff\"",
        b"\"\\ufdd0\"",
        b"\"\\u1fffe\"",
        b"\"\\u\n []",
        b"\"\\u12\x01 []",
        b"\"\\u00\xe9\xe9 \"",
        b"\"\\u\"",
        b"\"\\ud800\\u\"",
        b"\"\\ud800\\\"",
        b" \"",
        b"\"\xc3(\"",
        b"\"\xed\xa0\x80\"",
        b"\"\xf0\x9f\xbf\xbf\"",
        b"\"\xe0\x80\x80\"",
        b"\"\xf5\"",
        b"\"\x80\"",
        b"\"\xf8\x88\x80\x80\x80\"",
        b"{\"id\":\"\xc0\x80\"}",
        b"{\"id\":\"\xe2\x82\"}",
        b"{\"id\":\"\xf4\x90\x80\x80\"}",
        b"{\"id\":\"\xfe\"}[]",
        b"{\"a\xff\":1}\n",
        b"{\"id\":\"\x7f\\u00e9\\ud83d\\ude00\\u0000\\b\\f\\n\\r\\t\\/<>&\\u0001\"}",
        b"- ",
        b"-a \n",
        b"01 ",
        b"-01 ",
        b"00 []",
        b"0x10 []",
        b"1a []",
        b"1. \n",
        b"1.e5 []",
        b"1.5.5 []",
        b"1e \n",
        b"1e+ \n",
        b".5 []",
        b"+1 []",
        b"1-1 []",
        b"-[]",
        b"-\x01[]",
        b"1\xff[]",
        b"{\"id\":18446744073709551615}",
        b"{\"id\":18446744073709551616}",
        b"{\"id\":-9223372036854775808}",
        b"{\"id\":-9223372036854775809}",
        b"{\"id\":0.1}",
        b"{\"id\":1.0}",
        b"{\"id\":1e300}",
        b"{\"id\":-0}",
        b"{\"id\":-0.0}",
        b"{\"id\":1e-5}",
        b"{\"id\":0.0001}",
        b"{\"id\":123456789012345678.0}",
        b"{\"id\":1e16}",
        b"{\"id\":1e17}",
        b"{\"id\":5e-324}",
        b"{\"id\":1E+2}",
        b"{\"id\":12345.678}",
        b"{\"id\":99999999999999999.5}",
        b"{}",
        b"{\"id\":1}",
        b"{\"id\":null}",
        b"{\"id\":[{\"a\":[]}, {}]}",
        b"{\"execute\":1,\"id\":2}",
        b"{\"execute\":null}",
        b"{\"execute\":\"x\",\"arguments\":[]}",
        b"{\"execute\":\"x\",\"arguments\":null,\"id\":3}",
        b"{\"arguments\":{}}",
        b"{\"execute\":\"x\",\"control\":{}}",
        b"{\"exec-oob\":\"x\",\"id\":1}",
        b"{\"execute\":\"\"}",
        b"{\"EXECUTE\":\"x\"}",
        b"{\"execute\":\"a\\u0000b\"}",
        b"{\"execute\":\"\\u00e9\\n\\\"%s\"}",
        b"{\"execute\":\"query-version\",\"arguments\":{\"a\":1}}",
    ];
    let mut daemon = Daemon::start();
    for stream in streams {
        let shown = String::from_utf8_lossy(stream);
        assert_eq!(our_answers(stream), their_answers(&mut daemon, stream), "{shown:?}");
    }
}

#[test]
fn nesting_to_the_limit_and_beyond() {
    let mut daemon = Daemon::start();
    for depth in [1023, 1024, 1025, 3000] {
        for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("[{\"a\":", "}]")] {
            let stream = format!("{}1{}", open.repeat(depth), close.repeat(depth));
            let ours = our_answers(stream.as_bytes());
            assert_eq!(ours, their_answers(&mut daemon, stream.as_bytes()), "{depth} times {open}");
        }
    }
}

#[test]
fn random_streams() {
    let pieces: Vec<&'static [u8]> = vec![
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\"id\"",
        b"\"a\"",
        b"'id'",
        b"\"",
        b"'",
        b"\\",
        b"\\u12",
        b"\\ud800",
        b"\\n",
        b"1",
        b"-",
        b"0",
        b"1.5",
        b"e-3",
        b".",
        b"true",
        b"null",
        b"x",
        b"A",
        b"_",
        b" ",
        b"\n",
        b"\t",
        b"\r",
        b"*",
        b"%",
        b"\x00",
        b"\x01",
        b"\x1f",
        b"\x7f",
        b"\x80",
        b"\xc0",
        b"\xc3\xa9",
        b"\xe2\x82",
        b"\xf0\x9f\x98\x80",
        b"\xf5",
        b"\xe0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbf\xbf",
        b"\xf8\x88",
        b"\xfc",
        b"\xfe",
        b"\xff",
        b"{\"id\":",
        b"{\"execute\":\"x\"}",
        b"[1,",
        b"\"execute\"",
    ];
    let stream = proptest::collection::vec(proptest::sample::select(pieces), 1..24);
    let daemon = RefCell::new(Daemon::start());
    let config = Config { cases: 1000, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&stream, |pieces| {
        let stream = pieces.concat();
        prop_assert_eq!(our_answers(&stream), their_answers(&mut daemon.borrow_mut(), &stream));
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn greeting_and_negotiation() {
    for (options, style) in [("", Style::Compact), (",pretty=on", Style::Pretty)] {
        let (mut daemon, greeting) = Daemon::greeted(options);
        let theirs: serde_json::Value = serde_json::from_slice(&greeting).expect("JSON");
        let version = &theirs["QMP"]["version"];
        let number =
            |name: &str| version["qemu"][name].as_u64().and_then(|n| n.try_into().ok()).expect("a number");
        let version = Version {
            qemu: VersionTriple { micro: number("micro"), minor: number("minor"), major: number("major") },
            package: version["package"].as_str().expect("a text").to_owned(),
        };
        let ours = String::from_utf8(encode(&Greeting { version: &version }, style)).expect("ASCII");
        // They offer a capability that we don't.
        let oob = match style {
            Style::Compact => "[\"oob\"]",
            Style::Pretty => "[\r\n            \"oob\"\r\n        ]",
        };
        let none = if style == Style::Compact { "[]" } else { "[\r\n        ]" };
        let theirs = String::from_utf8(greeting).expect("ASCII").replace(oob, none);
        assert_eq!(ours, theirs);

        let mut exchange = |request: &[u8], response: Response| {
            daemon.send(request);
            let theirs = String::from_utf8(daemon.message()).expect("ASCII");
            assert_eq!(String::from_utf8(encode(&response, style)).expect("ASCII"), theirs);
        };
        let id = json!({ "a": [], "b": [1, { "c": {} }] });
        let early = Response::failure(QmpError::negotiation_expected(), Some(json!(1)));
        exchange(b"{\"execute\":\"x\",\"id\":1}", early);
        exchange(
            b"{\"execute\":\"qmp_capabilities\",\"id\":{\"a\":[],\"b\":[1,{\"c\":{}}]}}",
            Response::done(Some(id)),
        );
        let again = Response::failure(QmpError::negotiation_complete(), None);
        exchange(b"{\"execute\":\"qmp_capabilities\"}", again);
        let version = serde_json::to_value(&version).expect("a value");
        let answer = Response::success(version, Some(json!("v")));
        daemon.send(b"{\"execute\":\"query-version\",\"id\":\"v\"}");
        let theirs: serde_json::Value = serde_json::from_slice(&daemon.message()).expect("JSON");
        assert_eq!(serde_json::to_value(&answer).expect("a value"), theirs);
    }
}
