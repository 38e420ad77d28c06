//! The table is sound, and faults are told in the reference's words.

use super::*;
use serde_json::json;

#[test]
fn every_type_that_is_named_is_defined() {
    let schema = Schema::get();
    let check = |name: &str, of: &Type| {
        let mut of = of;
        while let Type::List(element) = of {
            of = element;
        }
        if let Type::Named(used) = of {
            assert!(schema.definition(used).is_some(), "{name} uses {used}");
        }
    };
    for command in &schema.commands {
        check(command.name, &command.result);
        assert!(matches!(schema.definition(command.arguments), Some(Definition::Object { .. })), "{}", command.name);
    }
    for (name, data) in &schema.events {
        assert!(schema.definition(data).is_some(), "{name}");
    }
    for (name, definition) in &schema.types {
        match definition {
            Definition::Enum(values) => assert!(!values.is_empty(), "{name}"),
            Definition::Alternate(types) => types.iter().for_each(|of| check(name, of)),
            Definition::Object { members, variants } => {
                members.iter().for_each(|member| check(name, &member.of));
                for (_, object) in variants.iter().flat_map(|variants| &variants.cases) {
                    assert!(schema.definition(object).is_some(), "{name} uses {object}");
                }
            }
        }
    }
}

#[test]
fn faults_are_told_in_the_reference_s_words() {
    for (command, arguments, desc) in [
        ("query-jobs", json!({"x": 1}), "Parameter 'x' is unexpected"),
        ("block-stream", json!({}), "Parameter 'device' is missing"),
        ("block-stream", json!({"device": 1}), "Invalid parameter type for 'device', expected: string"),
        ("block-stream", json!({"device": "d", "speed": "x"}), "Invalid parameter type for 'speed', expected: integer"),
        ("block-stream", json!({"device": "d", "on-error": "x"}), "Parameter 'on-error' does not accept value 'x'"),
        ("blockdev-add", json!({"driver": "foo"}), "Parameter 'driver' does not accept value 'foo'"),
        ("blockdev-add", json!({"node-name": "a"}), "Parameter 'driver' is missing"),
        ("blockdev-add", json!({"driver": "qcow2"}), "Parameter 'file' is missing"),
        ("blockdev-add", json!({"driver": "qcow2", "file": 1}), "Invalid parameter type for 'file', expected: BlockdevRef"),
        ("blockdev-add", json!({"driver": "qcow2", "file": {"driver": "file"}}), "Parameter 'file.filename' is missing"),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "file": {"driver": "file", "filename": "x", "zzz": 1}}),
            "Parameter 'file.zzz' is unexpected",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "cache": {"direct": "on"}}),
            "Invalid parameter type for 'cache.direct', expected: boolean",
        ),
        (
            "blockdev-add",
            json!({"driver": "blkdebug", "image": "y", "inject-error": [{"errno": 5}]}),
            "Parameter 'inject-error[0].event' is missing",
        ),
        (
            "transaction",
            json!({"actions": [{"type": "blockdev-snapshot", "data": {"node": 1}}]}),
            "Invalid parameter type for 'actions[0].data.node', expected: string",
        ),
    ] {
        let Value::Object(arguments) = arguments else { unreachable!("they are objects") };
        assert_eq!(check_command(command, arguments).unwrap_err().desc, desc);
    }
}

#[test]
fn a_command_line_s_leaves_become_what_json_would_have_carried() {
    let tree = json!({
        "driver": "raw", "size": "1M", "read-only": "on", "offset": "0x200",
        "file": {"driver": "null-co", "size": "2G", "read-zeroes": "off"},
    });
    let checked = check_type("BlockdevOptions", tree, Source::Keyval).unwrap();
    let expected = json!({
        "driver": "raw", "size": 1 << 20, "read-only": true, "offset": 512,
        "file": {"driver": "null-co", "size": 2_u64 << 30, "read-zeroes": false},
    });
    assert_eq!(checked, expected);
    let wrong = json!({"driver": "raw", "file": "f", "read-only": "maybe"});
    let refused = check_type("BlockdevOptions", wrong, Source::Keyval).unwrap_err();
    assert_eq!(refused.desc, "Parameter 'read-only' expects 'on' or 'off'");
}
