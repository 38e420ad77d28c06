//! Chardevs and traces that are right; the wrong ones are compared in `tests/against_qemu`.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn chardev(text: &str) -> (Value, Vec<String>) {
    match parse_chardev(text) {
        Ok(ParsedChardev::Chardev(chardev)) => {
            assert_eq!(chardev.id, "c");
            (chardev.backend, chardev.warnings)
        }
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn backends() {
    let cases = [
        ("null,id=c", json!({ "type": "null", "data": {} })),
        ("backend=stdio,id=c,signal=off", json!({ "type": "stdio", "data": { "signal": false } })),
        ("file,id=c,path=x,append=on", json!({ "type": "file", "data": { "out": "x", "append": true } })),
        ("pipe,id=c,path=p", json!({ "type": "pipe", "data": { "device": "p" } })),
        ("pty,id=c,logfile=l", json!({ "type": "pty", "data": { "logfile": "l" } })),
        (
            "socket,id=c,path=a,,b,server=on,wait=off",
            json!({ "type": "socket", "data": {
                "addr": { "type": "unix", "data": { "path": "a,b" } }, "server": true, "wait": false,
            } }),
        ),
        (
            "socket,id=c,host=h,port=1,to=65538,ipv6=on,delay=off,reconnect=5,server=on,server=off",
            json!({ "type": "socket", "data": {
                "addr": { "type": "inet", "data": { "host": "h", "port": "1", "to": 2, "ipv6": true } },
                "nodelay": true, "reconnect": 5, "server": false,
            } }),
        ),
        (
            "socket,id=c,fd=3",
            json!({ "type": "socket", "data": { "addr": { "type": "fd", "data": { "str": "3" } } } }),
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(chardev(text), (expected, Vec::new()), "{text}");
    }
}

#[test]
fn switches_are_taken_with_a_warning() {
    let (backend, warnings) = chardev("socket,id=c,path=x,server,nowait,nodelay");
    let expected = json!({ "type": "socket", "data": {
        "addr": { "type": "unix", "data": { "path": "x" } }, "server": true, "wait": false, "nodelay": true,
    } });
    assert_eq!(backend, expected);
    let texts = [
        "short-form boolean option 'server' deprecated\nPlease use server=on instead",
        "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead",
        "short-form boolean option 'nodelay' deprecated\nPlease use nodelay=on instead",
    ];
    assert_eq!(warnings, texts);
}

#[test]
fn help() {
    for text in ["help", "?", "socket,help", "null,id=c,?"] {
        assert_eq!(parse_chardev(text), Ok(ParsedChardev::Help), "{text}");
    }
    assert!(parse_trace("help").is_ok_and(|trace| trace.help));
}

#[test]
fn traces() {
    let trace = parse_trace("blk_*,events=e,file=f,,g").expect("it is right");
    assert_eq!(trace.enable.as_deref(), Some("blk_*"));
    assert_eq!(trace.events.as_deref(), Some("e"));
    assert_eq!(trace.file.as_deref(), Some("f,g"));
    assert_eq!(parse_trace(""), Ok(Trace::default()));
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC*|(socket|id|path|=|,|no|help|\\?|[a-c0-2])*") {
        let _ = parse_chardev(&text);
        let _ = parse_trace(&text);
    }
}
