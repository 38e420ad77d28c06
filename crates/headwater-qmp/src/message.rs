//! What passes over a monitor: the greeting, requests, their responses, and events.

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Map, Value};

use crate::error::QmpError;

/// The version that the greeting and `query-version` name.
///
/// Clients decide by it which features to expect, so it is the version of QEMU whose schema is offered; `package` may
/// say which program it really is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Version {
    /// The three numbers.
    pub qemu: VersionTriple,
    /// Free text.
    pub package: String,
}

/// The numbers of a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct VersionTriple {
    /// The third number.
    pub micro: u32,
    /// The second number.
    pub minor: u32,
    /// The first number.
    pub major: u32,
}

/// The first message to a client. It offers no capability, so requests are answered in order and never out of band.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting<'a> {
    /// What to claim to be.
    pub version: &'a Version,
}

impl Serialize for Greeting<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Body<'a> {
            version: &'a Version,
            capabilities: [&'a str; 0],
        }
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("QMP", &Body { version: self.version, capabilities: [] })?;
        map.end()
    }
}

/// A command that a client wants executed.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The command's name, not looked up yet.
    pub execute: String,
    /// Its arguments, not checked yet; empty if none were given.
    pub arguments: Map<String, Value>,
    /// What the response must repeat.
    pub id: Option<Value>,
}

/// A message that is no request, and the id to answer it with.
#[derive(Clone, Debug, PartialEq)]
pub struct BadRequest {
    /// What is wrong with it.
    pub error: QmpError,
    /// Its id, if it has one.
    pub id: Option<Value>,
}

impl Request {
    /// Takes a value from the wire apart.
    pub fn parse(message: Value) -> Result<Self, BadRequest> {
        let Value::Object(mut members) = message else {
            return Err(BadRequest { error: input("must be a JSON object"), id: None });
        };
        let id = members.remove("id");
        match Self::from_members(members) {
            Ok((execute, arguments)) => Ok(Self { execute, arguments, id }),
            Err(error) => Err(BadRequest { error, id }),
        }
    }

    fn from_members(members: Map<String, Value>) -> Result<(String, Map<String, Value>), QmpError> {
        let mut execute = None;
        let mut arguments = Map::new();
        for (name, value) in members {
            match (name.as_str(), value) {
                ("execute", Value::String(command)) => execute = Some(command),
                ("execute", _) => return Err(input("member 'execute' must be a string")),
                ("arguments", Value::Object(members)) => arguments = members,
                ("arguments", _) => return Err(input("member 'arguments' must be an object")),
                // That includes "exec-oob", as the greeting doesn't offer it.
                _ => return Err(input(&format!("member '{name}' is unexpected"))),
            }
        }
        Ok((execute.ok_or_else(|| input("lacks member 'execute'"))?, arguments))
    }
}

fn input(what: &str) -> QmpError {
    QmpError::generic(format!("QMP input {what}"))
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// What came of it. Commands that return nothing return an empty object.
    pub outcome: Result<Value, QmpError>,
    /// The id of the request.
    pub id: Option<Value>,
}

impl Response {
    /// The command was carried out.
    pub fn success(result: Value, id: Option<Value>) -> Self {
        Self { outcome: Ok(result), id }
    }

    /// The command was carried out and has nothing to return.
    pub fn done(id: Option<Value>) -> Self {
        Self::success(Value::Object(Map::new()), id)
    }

    /// The command failed, or wasn't even one.
    pub fn failure(error: impl Into<QmpError>, id: Option<Value>) -> Self {
        Self { outcome: Err(error.into()), id }
    }
}

impl Serialize for Response {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        // QEMU's order: the id follows a result and precedes an error.
        match &self.outcome {
            Ok(result) => {
                map.serialize_entry("return", result)?;
                self.id.iter().try_for_each(|id| map.serialize_entry("id", id))?;
            }
            Err(error) => {
                self.id.iter().try_for_each(|id| map.serialize_entry("id", id))?;
                map.serialize_entry("error", error)?;
            }
        }
        map.end()
    }
}

/// Something that happened, and when.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Event {
    /// When it happened.
    pub timestamp: Timestamp,
    /// Its name, one of [`crate::schema::event_names`].
    #[serde(rename = "event")]
    pub name: String,
    /// More about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

/// Time of day, since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: i64,
    /// The rest, below a million.
    pub microseconds: u32,
}

#[cfg(test)]
mod tests;
