//! The messages of QMP: what a client sends, and what it gets.

use crate::error::{ErrorClass, QmpError};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// What a client gets first. `version` is as `query-version` tells it. No capabilities are offered.
pub fn greeting(version: &Value) -> Value {
    json!({"QMP": {"version": version, "capabilities": []}})
}

/// A command that a client gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The command's name.
    pub execute: String,
    /// Its arguments; empty if there were none.
    pub arguments: Map<String, Value>,
}

impl Request {
    /// Reads a message of a client. Its `id` is the caller's, because it belongs to the answer even if this fails.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(message: Value) -> Result<Self, QmpError> {
        let Value::Object(members) = message else {
            return Err(QmpError::generic("QMP input must be a JSON object"));
        };
        let (mut execute, mut oob) = (None, None);
        let mut arguments = Map::new();
        for (name, value) in members {
            match (name.as_str(), value) {
                ("execute", Value::String(command)) => execute = Some(command),
                ("exec-oob", Value::String(command)) => oob = Some(command),
                (name @ ("execute" | "exec-oob"), _) => {
                    return Err(QmpError::generic(format!("QMP input member '{name}' must be a string")));
                }
                ("arguments", Value::Object(given)) => arguments = given,
                ("arguments", _) => {
                    return Err(QmpError::generic("QMP input member 'arguments' must be an object"));
                }
                ("id", _) => {}
                (name, _) => {
                    return Err(QmpError::generic(format!("QMP input member '{name}' is unexpected")));
                }
            }
        }
        match (execute, oob) {
            (Some(execute), None) => Ok(Self { execute, arguments }),
            (None, Some(command)) => {
                Err(QmpError::generic(format!("The command {command} does not support OOB")))
            }
            (Some(_), Some(_)) => Err(QmpError::generic("QMP input member 'exec-oob' clashes with 'execute'")),
            (None, None) => Err(QmpError::generic("QMP input lacks member 'execute'")),
        }
    }
}

/// The answer to a request with this `id`.
pub fn response(result: Result<Value, QmpError>, id: Option<Value>) -> Value {
    let mut answer = match result {
        Ok(value) => json!({"return": value}),
        Err(error) => json!({"error": error.to_value()}),
    };
    if let (Value::Object(answer), Some(id)) = (&mut answer, id) {
        answer.insert("id".into(), id);
    }
    answer
}

/// An event that happened `since_epoch` after the start of 1970.
pub fn event(name: &str, data: Value, since_epoch: Duration) -> Value {
    json!({
        "timestamp": {"seconds": since_epoch.as_secs(), "microseconds": since_epoch.subsec_micros()},
        "event": name,
        "data": data,
    })
}

/// The refusal of a command that isn't there.
pub fn no_such_command(name: &str) -> QmpError {
    QmpError::new(ErrorClass::CommandNotFound, format!("The command {name} has not been found"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_request_is_refused_in_the_reference_s_words() {
        for (message, desc) in [
            (json!([]), "QMP input must be a JSON object"),
            (json!({"arguments": {}}), "QMP input lacks member 'execute'"),
            (json!({"execute": 1}), "QMP input member 'execute' must be a string"),
            (json!({"execute": "x", "arguments": []}), "QMP input member 'arguments' must be an object"),
            (json!({"execute": "x", "foo": 1}), "QMP input member 'foo' is unexpected"),
            (json!({"exec-oob": "x"}), "The command x does not support OOB"),
        ] {
            assert_eq!(Request::parse(message).unwrap_err().desc, desc);
        }
        let request = Request::parse(json!({"execute": "x", "id": null})).unwrap();
        assert_eq!((request.execute.as_str(), request.arguments.len()), ("x", 0));
    }
}
