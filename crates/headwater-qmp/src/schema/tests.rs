//! Values after a check; errors are compared in `tests/against_qemu`.

use std::collections::HashSet;

use proptest::prelude::*;
use serde_json::json;

use super::*;

#[test]
fn the_table_is_read() {
    let names: Vec<_> = command_names().chain(event_names()).collect();
    assert!(names.len() > 60, "{names:?}");
    let unique: HashSet<_> = names.iter().collect();
    assert_eq!(unique.len(), names.len(), "nothing stands twice");
    assert!(command("nbd-server-add").is_some_and(Command::is_deprecated));
    assert!(command("block-dirty-bitmap-add").is_none());
    assert_eq!(query_commands()[0], json!({ "name": "qmp_capabilities" }));
}

/// A union's tag is a member that is an enum, and its branches are objects for values of that enum.
#[test]
fn unions_are_sound() {
    for (at, kind) in SCHEMA.types.iter().enumerate() {
        let Shape::Object { members, union: Some(union) } = &kind.shape else { continue };
        let tag = members.iter().find(|member| member.name == union.tag);
        let tag = tag.unwrap_or_else(|| panic!("{} has no member {}", kind.name, union.tag));
        let Shape::Enum(values) = &SCHEMA.get(tag.kind).shape else { panic!("{}: no enum", kind.name) };
        assert!(!tag.optional, "{}", kind.name);
        for (case, branch) in &union.branches {
            assert!(values.iter().any(|value| value.name == *case), "{}: no value {case}", kind.name);
            assert!(matches!(SCHEMA.get(*branch).shape, Shape::Object { .. }), "{}: {case}", kind.name);
        }
        assert_ne!(TypeId(at), SCHEMA.empty());
    }
}

#[test]
fn commands_that_do_not_exist() {
    let error = check_command("block-dirty-bitmap-add", Map::new()).expect_err("it isn't offered");
    assert_eq!(error, QmpError::command_not_found("block-dirty-bitmap-add"));
    assert_eq!(error.desc, "The command block-dirty-bitmap-add has not been found");
}

#[test]
fn drivers_that_are_not_offered() {
    for driver in ["iscsi", "vmdk", "luks", "no-such-driver"] {
        let options = json!({ "driver": driver, "node-name": "a" });
        let error = check_type("BlockdevOptions", options, Source::Json).expect_err("it isn't offered");
        assert_eq!(error.desc, format!("Parameter 'driver' does not accept value '{driver}'"));
    }
}

#[test]
fn options_become_what_qmp_would_have_sent() {
    let options = json!({
        "driver": "qcow2", "node-name": "disk", "read-only": "on", "cache-size": "0x100000",
        "file": { "driver": "file", "filename": "x", "cache": { "direct": "yes" } },
        "backing": "below", "overlap-check": { "template": "all", "main-header": "n" },
    });
    let expected = json!({
        "driver": "qcow2", "node-name": "disk", "read-only": true, "cache-size": 1_048_576,
        "file": { "driver": "file", "filename": "x", "cache": { "direct": true } },
        "backing": "below", "overlap-check": { "template": "all", "main-header": false },
    });
    assert_eq!(check_type("BlockdevOptions", options, Source::Keyval), Ok(expected.clone()));
    assert_eq!(check_type("BlockdevOptions", expected.clone(), Source::Json), Ok(expected));
}

#[test]
fn depth_is_bounded() {
    let nested = |depth: usize, inner: &str| {
        let text = format!("{}{inner}{}", "{'driver':'raw','file':".repeat(depth), "}".repeat(depth));
        crate::json::from_text(&text).expect("it is within the reader's limit")
    };
    let value = nested(256, "'x'");
    assert_eq!(check_type("BlockdevOptions", value.clone(), Source::Json), Ok(value));
    for depth in [257, 1023] {
        let error = check_type("BlockdevOptions", nested(depth, "'x'"), Source::Json).expect_err("too deep");
        assert_eq!(error.desc, "Parameter 'driver' is nested too deeply");
    }
    let error =
        check_type("BlockdevOptions", nested(250, "{}"), Source::Json).expect_err("a driver is missing");
    assert_eq!(error.desc.matches("file").count(), 250);
}

#[test]
fn null_has_a_meaning_of_its_own() {
    let options = json!({ "driver": "qcow2", "file": "x", "backing": null });
    assert_eq!(check_type("BlockdevOptions", options.clone(), Source::Json), Ok(options));
}

#[test]
fn a_negative_unsigned_integer_wraps() {
    let arguments = json!({ "node-name": "a", "write-threshold": -1 });
    let Value::Object(arguments) = arguments else { unreachable!() };
    let checked = check_command("block-set-write-threshold", arguments).expect("QEMU takes it");
    assert_eq!(checked["write-threshold"], json!(u64::MAX));
}

#[test]
fn numbers() {
    assert_eq!(number::int_from_text(" -0x10"), Ok(-16));
    assert_eq!(number::int_from_text("010"), Ok(8));
    assert_eq!(number::int_from_text("-9223372036854775808"), Ok(i64::MIN));
    assert_eq!(number::int_from_text("9223372036854775808"), Err(NumberError::Range));
    assert_eq!(number::int_from_text("1k"), Err(NumberError::Syntax));
    assert_eq!(number::uint_from_text("-1"), Ok(u64::MAX));
    assert_eq!(number::size_from_text("1.5k"), Ok(1536));
    assert_eq!(number::size_from_text("0x1F"), Ok(31));
    assert_eq!(number::size_from_text("010"), Ok(10));
    assert_eq!(number::size_from_text("2E"), Ok(2 << 60));
    assert_eq!(number::size_from_text("16E"), Err(NumberError::Range));
    assert_eq!(number::size_from_text("0.5"), Err(NumberError::Syntax));
}

proptest! {
    #[test]
    fn no_text_of_a_number_panics(text in "\\PC*|[-+ 0-9.xkMEb]{0,30}") {
        let _ = number::int_from_text(&text);
        let _ = number::uint_from_text(&text);
        let _ = number::size_from_text(&text);
    }

    #[test]
    fn sizes_are_read_back(bytes: u64) {
        prop_assert_eq!(number::size_from_text(&bytes.to_string()), Ok(bytes));
        prop_assert_eq!(number::size_from_text(&format!("{bytes:#x}")), Ok(bytes));
    }
}
