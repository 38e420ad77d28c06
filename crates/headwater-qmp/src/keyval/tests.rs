//! Trees of options; errors are compared in `tests/against_qemu`.

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn tree(text: &str) -> Value {
    let keyval = parse(text, Some("driver")).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert!(!keyval.help);
    Value::Object(keyval.tree)
}

#[test]
fn trees() {
    assert_eq!(tree(""), json!({}));
    assert_eq!(tree("raw"), json!({ "driver": "raw" }));
    assert_eq!(tree("raw,"), json!({ "driver": "raw" }));
    assert_eq!(tree("raw,driver=file"), json!({ "driver": "file" }));
    assert_eq!(tree("a=1,b=2=3,a="), json!({ "a": "", "b": "2=3" }));
    assert_eq!(tree("a=x,,y,,,b=,,"), json!({ "a": "x,y,", "b": "," }));
    assert_eq!(tree("a.b.c=1,a.d=2"), json!({ "a": { "b": { "c": "1" }, "d": "2" } }));
    assert_eq!(tree("a.1=y,a.0=x"), json!({ "a": ["x", "y"] }));
    assert_eq!(tree("a.0.b=x,a.01.b=y"), json!({ "a": [{ "b": "x" }, { "b": "y" }] }));
    assert_eq!(tree("__com.example_a.b=1"), json!({ "__com.example_a": { "b": "1" } }));
}

#[test]
fn help() {
    for text in ["help", "?", "help,", "raw,help", "raw,?,a=1"] {
        assert!(parse(text, Some("driver")).expect("it is right").help, "{text}");
    }
}

#[test]
fn depth_is_bounded() {
    let key = vec!["a"; 20_000].join(".");
    let error = parse(&format!("{key}=1"), None).expect_err("that is too deep");
    assert!(error.desc.ends_with("is nested too deeply"), "{}", error.desc);
    let key = vec!["a"; MAX_DEPTH].join(".");
    assert!(parse(&format!("{key}=1"), None).is_ok());
}

/// Trees that an option can say: no empty lists and objects.
fn any_tree() -> impl Strategy<Value = Value> {
    let leaf = "\\PC{0,6}|[,=.a]{0,6}".prop_map(Value::from);
    let inner = leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 1..4).prop_map(Value::from),
            proptest::collection::btree_map("[a-z][a-z0-9_-]{0,4}", inner, 1..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    });
    proptest::collection::btree_map("[a-z][a-z0-9_-]{0,4}", inner, 0..4)
        .prop_map(|members| Value::Object(members.into_iter().collect()))
}

fn write(value: &Value, key: &str, parameters: &mut Vec<String>) {
    let inner = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        Value::Object(members) => {
            members.iter().for_each(|(name, member)| write(member, &inner(name), parameters));
        }
        Value::Array(items) => {
            let items = items.iter().enumerate();
            items.for_each(|(index, item)| write(item, &inner(&index.to_string()), parameters));
        }
        leaf => {
            parameters.push(format!("{key}={}", escape_value(leaf.as_str().expect("leaves are strings"))))
        }
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(tree in any_tree(), backwards: bool) {
        let mut parameters = Vec::new();
        write(&tree, "", &mut parameters);
        if backwards {
            parameters.reverse();
        }
        let read = parse(&parameters.join(","), None).expect("it is right");
        prop_assert_eq!(Value::Object(read.tree), tree);
    }

    #[test]
    fn no_text_panics(text in "\\PC*|([a-c0-2.=,_?]|help|__a_)*", implied: bool) {
        let _ = parse(&text, implied.then_some("driver"));
    }
}
