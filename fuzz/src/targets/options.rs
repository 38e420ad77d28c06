//! What people write on command lines: options in every syntax, sizes, NBD addresses.
//!
//! Input: a byte that chooses what it is for, then a text.
//!
//! Asserted: an option that was understood is understood again when it is written as JSON; values survive being escaped; an address that
//! was understood is the same when it is written out and read again.

use crate::Target;
use headwater_nbd::NbdUri;
use headwater_qmp::option::{Parsed, parse};
use headwater_qmp::{OptionKind, Style, Value, encode, json, keyval, opts, schema};

/// See the module.
pub const TARGET: Target = Target { name: "options", run, seeds, max_len: 1024 };

const KINDS: [OptionKind; 5] = [
    OptionKind::Blockdev,
    OptionKind::Export,
    OptionKind::NbdServer,
    OptionKind::Object,
    OptionKind::Monitor,
];

fn run(data: &[u8]) {
    let Some((choice, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    match choice % 10 {
        0 => {
            let _ = opts::parse_chardev(text);
        }
        1 => {
            let _ = opts::parse_trace(text);
        }
        2 => check_keyval(text),
        3 => check_address(text),
        4 => check_numbers(text),
        kind => check_option(KINDS[usize::from(kind - 5)], text),
    }
}

fn check_option(kind: OptionKind, text: &str) {
    let Ok(Parsed::Value(members)) = parse(kind, text) else { return };
    let json = encode(&Value::Object(members.clone()), Style::Compact);
    let json = std::str::from_utf8(&json).expect("what is encoded is text");
    assert_eq!(parse(kind, json), Ok(Parsed::Value(members)), "{text:?} isn't understood as {json:?}");
}

/// Reads a tree, writes its leaves as an option, and reads that.
fn check_keyval(text: &str) {
    let Ok(parsed) = keyval::parse(text, Some("implied")) else { return };
    let mut pairs = Vec::new();
    for (name, value) in &parsed.tree {
        leaves(name, value, &mut pairs);
    }
    let again = keyval::parse(&pairs.join(","), None);
    assert_eq!(again.map(|again| again.tree), Ok(parsed.tree), "{text:?} as {pairs:?}");
}

fn leaves(key: &str, value: &Value, pairs: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            members.iter().for_each(|(name, member)| leaves(&format!("{key}.{name}"), member, pairs))
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| leaves(&format!("{key}.{i}"), item, pairs))
        }
        Value::String(text) => pairs.push(format!("{key}={}", keyval::escape_value(text))),
        other => panic!("a leaf that is no text: {other}"),
    }
}

fn check_address(text: &str) {
    match text.parse::<NbdUri>() {
        Ok(uri) => {
            assert!(NbdUri::is_nbd(text), "{text:?} is an address but doesn't look like one");
            let written = uri.to_string();
            assert_eq!(written.parse::<NbdUri>().as_ref(), Ok(&uri), "{text:?} is written as {written:?}");
        }
        Err(error) => assert!(error.to_string().contains("bad NBD address")),
    }
}

fn check_numbers(text: &str) {
    for source in [schema::Source::Keyval, schema::Source::Json] {
        let value = match source {
            schema::Source::Json => json::from_text(text).unwrap_or(Value::Null),
            schema::Source::Keyval => Value::String(text.to_owned()),
        };
        for name in ["size", "int", "uint64", "uint32", "int32", "number", "bool"] {
            let _ = schema::check_type(name, value.clone(), source);
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    [
        (0, "socket,id=m,path=/run/x.sock,server=on,wait=off"),
        (0, "socket,id=m,host=localhost,port=4444,to=4450,ipv4,nodelay,server,reconnect-ms=7"),
        (0, "stdio,id=s,signal=off,mux=on"),
        (1, "enable=blk_*,file=trace.log,events=list"),
        (2, "a.b.0=x,a.b.1=y,,z,c=,implied,help"),
        (2, "word,__com.example_x.y=1,a.00=b,a.1=c"),
        (3, "nbd://host:10810/export%20name"),
        (3, "nbd+unix:///e?socket=/run/a%2Cb"),
        (3, "nbds://[::1]:1/?tls-certificates=/d&tls-hostname=h&tls-verify-peer=false"),
        (3, "nbds+unix:///x?tls-certificates=d&socket=s"),
        (4, "1.5G"),
        (4, "0x10"),
        (4, "-9223372036854775808"),
        (4, "1e5k"),
        (5, "driver=qcow2,node-name=n,file.driver=file,file.filename=a,,b.qcow2,backing=base,discard=unmap"),
        (5, "nbd,server.type=inet,server.host=h,server.port=1,export=e,node-name=n,reconnect-delay=3"),
        (5, r#"{"driver":"throttle","throttle-group":"t","file":"n","node-name":"x"}"#),
        (5, "blkdebug,image=f,inject-error.0.event=read_aio,inject-error.0.errno=28,node-name=b"),
        (6, "type=nbd,id=e,node-name=n,name=x,writable=on,bitmaps.0=a"),
        (6, "vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=s,num-queues=2"),
        (7, "addr.type=inet,addr.host=h,addr.port=0,max-connections=5,tls-creds=t"),
        (8, "throttle-group,id=t,limits.iops-total=100,x-bps-read=1k"),
        (8, "tls-creds-x509,id=t,dir=/d,endpoint=server,verify-peer=no,help"),
        (9, "chardev=m,mode=control,pretty=on,id=x"),
    ]
    .into_iter()
    .map(|(choice, text): (u8, &str)| [&[choice], text.as_bytes()].concat())
    .collect()
}
