//! The members of messages and their order; errors of requests are compared in `tests/against_qemu`.

use serde_json::json;

use super::*;
use crate::json::{Style, encode};

fn text(message: &impl Serialize) -> String {
    String::from_utf8(encode(message, Style::Compact)).expect("ASCII")
}

#[test]
fn a_request_in_full() {
    let message = json!({ "execute": "x", "arguments": { "a": 1 }, "id": [1] });
    let request = Request::parse(message).expect("it is a request");
    assert_eq!(request.execute, "x");
    assert_eq!(Value::Object(request.arguments), json!({ "a": 1 }));
    assert_eq!(request.id, Some(json!([1])));
}

#[test]
fn an_id_may_be_null() {
    let request = Request::parse(json!({ "execute": "x", "id": null })).expect("it is a request");
    assert_eq!(request.id, Some(Value::Null));
    assert_eq!(text(&Response::done(request.id)), "{\"return\": {}, \"id\": null}\r\n");
}

#[test]
fn a_bad_request_keeps_its_id() {
    let bad = Request::parse(json!({ "exec-oob": "x", "id": 5 })).expect_err("out of band isn't offered");
    assert_eq!(
        text(&Response::failure(bad.error, bad.id)),
        "{\"id\": 5, \"error\": {\"class\": \"GenericError\", \
         \"desc\": \"QMP input member 'exec-oob' is unexpected\"}}\r\n"
    );
}

#[test]
fn events() {
    let timestamp = Timestamp { seconds: 1_700_000_000, microseconds: 42 };
    let data = json!({ "id": "e" });
    let event = Event { timestamp, name: "BLOCK_EXPORT_DELETED".to_owned(), data: Some(data) };
    assert_eq!(
        text(&event),
        "{\"timestamp\": {\"seconds\": 1700000000, \"microseconds\": 42}, \
         \"event\": \"BLOCK_EXPORT_DELETED\", \"data\": {\"id\": \"e\"}}\r\n"
    );
    let event = Event { timestamp, name: "STOP".to_owned(), data: None };
    assert_eq!(
        text(&event),
        "{\"timestamp\": {\"seconds\": 1700000000, \"microseconds\": 42}, \"event\": \"STOP\"}\r\n"
    );
}
