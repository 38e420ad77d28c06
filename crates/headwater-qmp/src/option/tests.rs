//! Options that are right; the wrong ones are compared in `tests/against_qemu`.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn value(kind: OptionKind, text: &str) -> Value {
    match parse(kind, text) {
        Ok(Parsed::Value(members)) => Value::Object(members),
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn each_kind() {
    assert_eq!(
        value(OptionKind::Blockdev, "file,filename=a,,b,node-name=n,aio=io_uring,read-only=on"),
        json!({ "driver": "file", "filename": "a,b", "node-name": "n", "aio": "io_uring", "read-only": true })
    );
    assert_eq!(
        value(OptionKind::Export, "nbd,id=e,node-name=n,writable=on,bitmaps.0=b"),
        json!({ "type": "nbd", "id": "e", "node-name": "n", "writable": true, "bitmaps": ["b"] })
    );
    assert_eq!(
        value(OptionKind::NbdServer, "addr.type=inet,addr.host=::1,addr.port=10809,max-connections=0"),
        json!({ "addr": { "type": "inet", "host": "::1", "port": "10809" }, "max-connections": 0 })
    );
    assert_eq!(
        value(OptionKind::Object, "throttle-group,id=t,limits.iops-total=5,x-bps-read=7"),
        json!({ "qom-type": "throttle-group", "id": "t", "limits": { "iops-total": 5 }, "x-bps-read": 7 })
    );
    assert_eq!(value(OptionKind::Monitor, "m,pretty=on"), json!({ "chardev": "m", "pretty": true }));
}

#[test]
fn json_is_taken_as_it_is() {
    assert_eq!(
        value(OptionKind::Blockdev, "{'driver': 'null-co', 'size': 5}"),
        json!({ "driver": "null-co", "size": 5 })
    );
}

#[test]
fn help_is_for_objects() {
    let Ok(Parsed::Help(tree)) = parse(OptionKind::Object, "iothread,help") else { panic!("no help") };
    assert_eq!(Value::Object(tree), json!({ "qom-type": "iothread" }));
    assert!(parse(OptionKind::Export, "help").is_err());
}

#[test]
fn identifiers() {
    assert!(["a", "a1", "A-b.c_d"].into_iter().all(is_identifier));
    assert!(!["", "1", "-a", "a b", "é", "a,b", "#block1"].into_iter().any(is_identifier));
    let error = check_identifier("id", "1").expect_err("it begins with a digit");
    assert_eq!(error.desc, "Parameter 'id' expects an identifier");
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC*|(raw|qcow2|file|driver|[a-c0-2.=,{}\"':?])*") {
        for kind in [OptionKind::Blockdev, OptionKind::NbdServer, OptionKind::Object] {
            let _ = parse(kind, &text);
        }
    }
}
