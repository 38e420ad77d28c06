//! What a QMP client sends: a stream of JSON, the requests in it, and their arguments.
//!
//! Input: a byte that says in which pieces it arrives, then the stream.
//!
//! Asserted: how it is cut changes nothing; a value survives encoding, in both styles; a request that was understood is one again when it is sent; arguments
//! that were checked are accepted when they are checked again; an answer to every request can be sent.

use crate::Target;
use headwater_qmp::schema::check_command;
use headwater_qmp::{Map, Reader, Request, Response, Style, SyntaxError, Value, encode, schema};

/// See the module.
pub const TARGET: Target = Target { name: "qmp", run, seeds, max_len: 4096 };

fn run(data: &[u8]) {
    let Some((cut, stream)) = data.split_first() else { return };
    let values = read(stream, stream.len().max(1));
    assert_eq!(values, read(stream, usize::from(cut % 64) + 1), "it matters how the stream is cut");
    for value in values {
        match value {
            Ok(value) => check_value(value),
            Err(error) => check_answer(Response::failure(error, None)),
        }
    }
}

fn read(stream: &[u8], piece: usize) -> Vec<Result<Value, SyntaxError>> {
    let mut reader = Reader::new();
    let mut values = Vec::new();
    for piece in stream.chunks(piece) {
        reader.push(piece);
        values.extend(std::iter::from_fn(|| reader.next()));
    }
    values.extend(reader.finish());
    values
}

fn check_value(value: Value) {
    for style in [Style::Compact, Style::Pretty] {
        let text = encode(&value, style);
        assert!(text.is_ascii() && text.ends_with(b"\r\n"));
        let again = read(&text, text.len());
        let same = matches!(again.as_slice(), [Ok(again)] if is_same(again, &value));
        assert!(same, "{value} is written as {}", text.escape_ascii());
    }
    let request = match Request::parse(value) {
        Ok(request) => request,
        Err(bad) => return check_answer(Response::failure(bad.error, bad.id)),
    };
    let answer = match check_command(&request.execute, request.arguments) {
        Ok(arguments) => {
            assert!(schema::command(&request.execute).is_some());
            let again = check_command(&request.execute, arguments.clone());
            assert_eq!(again, Ok(arguments.clone()), "{}: what was checked is refused", request.execute);
            let mut message = Map::new();
            message.insert("execute".to_owned(), request.execute.clone().into());
            message.insert("arguments".to_owned(), arguments.clone().into());
            let sent = Request::parse(Value::Object(message)).expect("a request");
            assert_eq!((sent.execute, sent.arguments), (request.execute, arguments));
            Response::done(request.id)
        }
        Err(error) => Response::failure(error, request.id),
    };
    check_answer(answer);
}

/// Whether two values are the same; for QEMU 30000.0 and 30000 are.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a == b || a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| is_same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|((k, a), (l, b))| k == l && is_same(a, b))
        }
        _ => a == b,
    }
}

fn check_answer(answer: Response) {
    let text = encode(&answer, Style::Compact);
    let id = answer.id;
    let Some(Ok(Value::Object(members))) = read(&text, text.len()).pop() else {
        panic!("an answer that is no object: {}", text.escape_ascii());
    };
    assert!(members.contains_key("return") != members.contains_key("error"));
    let same = members.get("id").zip(id.as_ref()).map(|(a, b)| is_same(a, b));
    assert_eq!(same, id.is_some().then_some(true), "the id is lost");
}

fn seeds() -> Vec<Vec<u8>> {
    let streams = [
        r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}"#,
        r#"{"execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"x.qcow2","locking":"off"},"backing":null},"id":{"a":[1,2.5,null]}}"#,
        r#"{'execute': 'block-stream', 'arguments': {'device':'n','job-id':'j','speed':1048576,'auto-dismiss':false,'on-error':'report'}}"#,
        r#"{"execute":"blockdev-create","arguments":{"job-id":"c","options":{"driver":"qcow2","file":"f","size":1048576,"cluster-size":65536}}}"#,
        r#"{"execute":"transaction","arguments":{"actions":[{"type":"blockdev-snapshot","data":{"node":"a","overlay":"b"}}]}}"#,
        r#"{"execute":"object-add","arguments":{"qom-type":"throttle-group","id":"t","limits":{"iops-total":100}}}"#,
        r#"{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"s"}},"tls-creds":"t"}}"#,
        r#"{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"n","writable":true,"bitmaps":["b"]}}"#,
        r#"{"exec-oob":"query-jobs"} [1,-2,3e4,18446744073709551615,-9223372036854775808,1e309] "\u00e9\ud83d\ude00\n" true"#,
        r#"{"execute": "query-qmp-schema"}{"execute": "quit"} 'it''s' {"a" "b"} ]"#,
        "\u{fffd} {\"\\ud800\": \"\\u0000\"} [[[[[[{{}}]]]]] %d \u{7f}",
    ];
    let mut seeds: Vec<Vec<u8>> = streams.iter().map(|text| [b"\x06", text.as_bytes()].concat()).collect();
    seeds.push([&b"\x01"[..], &[b'['; 1100]].concat());
    seeds.push(b"\x02{\"execute\":\"\xff\xfe\xc0\x80\"}".to_vec());
    seeds
}
