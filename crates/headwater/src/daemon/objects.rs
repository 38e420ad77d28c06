//! Objects that nodes and servers refer to by id: throttle groups, secrets, TLS credentials, and I/O threads, which exist by name only,
//! because all disks of this daemon are on one thread.

mod tls;

use super::failure::{Refusal, generic, of_error};
use super::graph::open::{Options, Read};
use super::qom;
use headwater_block::filter::throttle::{Directions, Limit, ThrottleGroup, ThrottleLimits};
use headwater_block::{Abort, Clock, Patience, TokioClock};
use headwater_image::open_gate::Trust;
use headwater_qmp::option::check_identifier;
use headwater_qmp::schema::{self, Source};
use headwater_tls::{Endpoint, TlsCredentials};
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;

/// What an object is.
enum Kind {
    ThrottleGroup(Rc<ThrottleGroup>),
    TlsCredentials(TlsCredentials),
    Secret(Secret),
    IoThread,
}

/// Where a secret is, which is read when it is needed.
enum Secret {
    Data(String),
    File(PathBuf),
    /// Encoded or encrypted: nothing here takes such ones.
    Wrapped,
}

struct Object {
    id: String,
    qom_type: String,
    kind: Kind,
}

/// All objects, in the order in which they were made.
#[derive(Default)]
pub(super) struct Objects {
    objects: RefCell<Vec<Object>>,
    trust: RefCell<Trust>,
    patience: Cell<Patience>,
    ending: Rc<Abort>,
}

impl Objects {
    /// What names found inside images may lead to.
    pub(super) fn trust(&self) -> Trust {
        self.trust.borrow().clone()
    }

    pub(super) fn set_trust(&self, trust: Trust) {
        self.trust.replace(trust);
    }

    /// For how long clients' requests and jobs wait for a source that can't be reached.
    pub(super) fn patience(&self) -> Patience {
        self.patience.get()
    }

    pub(super) fn set_patience(&self, patience: Patience) {
        self.patience.set(patience);
    }

    /// Thrown when the daemon ends, and what is out of reach isn't waited for any more.
    pub(super) fn ending(&self) -> &Rc<Abort> {
        &self.ending
    }

    /// Makes an object.
    ///
    /// # Errors
    /// If the id is taken, or its properties are wrong.
    pub(super) fn add(&self, options: &Options) -> Result<(), Refusal> {
        let id = options.text("id").ok_or_else(|| generic("Parameter 'id' is missing"))?;
        let qom_type = options.text("qom-type").ok_or_else(|| generic("Parameter 'qom-type' is missing"))?;
        check_identifier("id", id)?;
        if self.objects.borrow().iter().any(|object| object.id == id) {
            return Err(generic(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let kind = match qom_type {
            "throttle-group" => {
                let limits = throttle_limits(options);
                let clock: Rc<dyn Clock> = Rc::new(TokioClock::new());
                Kind::ThrottleGroup(ThrottleGroup::new(id, clock, limits).map_err(|err| of_error(&err))?)
            }
            "tls-creds-x509" => Kind::TlsCredentials(tls::x509(options)?),
            "tls-creds-psk" => Kind::TlsCredentials(tls::psk(options)?),
            "secret" => {
                match (options.text("file"), options.text("data")) {
                    (Some(_), Some(_)) => return Err(generic("'file' and 'data' are mutually exclusive")),
                    (None, None) => return Err(generic("Either 'file' or 'data' must be provided")),
                    (Some(file), None) => {
                        std::fs::metadata(file)
                            .map_err(|err| generic(format!("Unable to read {file}: {err}")))?;
                    }
                    (None, Some(_)) => {}
                }
                Kind::Secret(secret(options))
            }
            "iothread" => Kind::IoThread,
            other => return Err(generic(format!("Parameter 'qom-type' does not accept value '{other}'"))),
        };
        self.objects.borrow_mut().push(Object { id: id.to_owned(), qom_type: qom_type.to_owned(), kind });
        Ok(())
    }

    /// Removes an object that nobody uses.
    ///
    /// # Errors
    /// If there is none, or it is in use.
    pub(super) fn remove(&self, id: &str) -> Result<(), Refusal> {
        let mut objects = self.objects.borrow_mut();
        let at = objects
            .iter()
            .position(|object| object.id == id)
            .ok_or_else(|| generic(format!("object '{id}' not found")))?;
        if matches!(&objects[at].kind, Kind::ThrottleGroup(group) if group.members() > 0) {
            return Err(generic(format!("object '{id}' is in use, can not be deleted")));
        }
        objects.remove(at);
        Ok(())
    }

    /// The throttle group called `id`.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn throttle_group(&self, id: &str) -> Result<Rc<ThrottleGroup>, Refusal> {
        let found = self.objects.borrow().iter().find(|object| object.id == id).and_then(|object| {
            match &object.kind {
                Kind::ThrottleGroup(group) => Some(group.clone()),
                _ => None,
            }
        });
        found.ok_or_else(|| generic(format!("Throttle group '{id}' does not exist")))
    }

    /// The TLS credentials called `id`, for this end of a connection.
    ///
    /// # Errors
    /// If there are none, or they are for the other end.
    pub(super) fn credentials(&self, id: &str, endpoint: Endpoint) -> Result<TlsCredentials, Refusal> {
        let objects = self.objects.borrow();
        let object = objects.iter().find(|object| object.id == id);
        let object = object.ok_or_else(|| generic(format!("No TLS credentials with id '{id}'")))?;
        let Kind::TlsCredentials(credentials) = &object.kind else {
            return Err(generic(format!("Object with id '{id}' is not TLS credentials")));
        };
        if credentials.endpoint() != endpoint {
            let wanted = if endpoint == Endpoint::Server { "server" } else { "client" };
            return Err(generic(format!("Expected TLS credentials for a {wanted} endpoint")));
        }
        Ok(credentials.clone())
    }

    /// What the secret called `id` holds, as text without the line's end.
    ///
    /// # Errors
    /// If there is none, or it can't be read.
    pub(super) fn secret(&self, id: &str) -> Result<String, Refusal> {
        let objects = self.objects.borrow();
        let object = objects.iter().find(|object| object.id == id);
        let object = object.ok_or_else(|| generic(format!("No secret with id '{id}'")))?;
        let Kind::Secret(secret) = &object.kind else {
            return Err(generic(format!("Object with id '{id}' is not a secret")));
        };
        let text = match secret {
            Secret::Data(text) => text.clone(),
            Secret::File(file) => std::fs::read_to_string(file)
                .map_err(|err| generic(format!("Unable to read {}: {err}", file.display())))?,
            Secret::Wrapped => {
                return Err(generic(format!(
                    "Secret '{id}' is in base64 or encrypted, which is not supported"
                )));
            }
        };
        Ok(text.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// True if there is an I/O thread called `id`.
    pub(super) fn is_io_thread(&self, id: &str) -> bool {
        self.objects.borrow().iter().any(|object| object.id == id && matches!(object.kind, Kind::IoThread))
    }

    /// `qom-list` of a path.
    ///
    /// # Errors
    /// If there is nothing there.
    pub(super) fn list(&self, path: &str) -> Result<Value, Refusal> {
        let objects = self.objects.borrow();
        if path == "/" || path.is_empty() {
            return Ok(json!([
                {"name": "type", "type": "string"},
                {"name": "objects", "type": "child<container>"},
            ]));
        }
        if path.trim_end_matches('/') == "/objects" {
            let own = json!({"name": "type", "type": "string"});
            let children = objects
                .iter()
                .map(|object| json!({"name": object.id, "type": format!("child<{}>", object.qom_type)}));
            return Ok(std::iter::once(own).chain(children).collect());
        }
        let object = find(&objects, path)?;
        Ok(qom::of_type(&object.qom_type).unwrap_or_default())
    }

    /// `qom-get`: one property of an object.
    ///
    /// # Errors
    /// If there is no such object or property.
    pub(super) fn get(&self, path: &str, property: &str) -> Result<Value, Refusal> {
        let objects = self.objects.borrow();
        let object = find(&objects, path)?;
        let none = || generic(format!("Property '{}.{property}' not found", object.qom_type));
        match (&object.kind, property) {
            (_, "type") => Ok(object.qom_type.clone().into()),
            (Kind::Secret(Secret::Data(data)), "data") => Ok(data.clone().into()),
            (Kind::Secret(Secret::File(file)), "file") => Ok(file.to_string_lossy().into()),
            (Kind::ThrottleGroup(group), "limits") => Ok(shown_limits(&group.limits())),
            (Kind::ThrottleGroup(group), _) => {
                let limits = shown_limits(&group.limits());
                property.strip_prefix("x-").and_then(|name| limits.get(name)).cloned().ok_or_else(none)
            }
            _ => Err(none()),
        }
    }

    /// `qom-set`: the limits of a throttle group.
    ///
    /// # Errors
    /// If there is no such property, or it can't be so.
    pub(super) fn set(&self, path: &str, property: &str, value: &Value) -> Result<(), Refusal> {
        let objects = self.objects.borrow();
        let object = find(&objects, path)?;
        let Kind::ThrottleGroup(group) = &object.kind else {
            return Err(generic(format!("Property '{}.{property}' not found", object.qom_type)));
        };
        let mut limits = match shown_limits(&group.limits()) {
            Value::Object(limits) => limits,
            _ => Options::new(),
        };
        match (property, value) {
            ("limits", Value::Object(new)) => {
                let known = schema::check_type("ThrottleLimits", new.clone().into(), Source::Json);
                let inside = |err: Refusal| generic(err.desc.replacen('\'', "'limits.", 1));
                known.map_err(inside)?;
                limits.extend(new.clone());
            }
            ("limits", _) => return Err(generic("Invalid parameter type for 'limits', expected: object")),
            _ => match property.strip_prefix("x-").filter(|name| limits.contains_key(*name)) {
                Some(name) if value.is_u64() => drop(limits.insert(name.to_owned(), value.clone())),
                Some(_) => {
                    return Err(generic(format!(
                        "Invalid parameter type for '{property}', expected: integer"
                    )));
                }
                None => return Err(generic(format!("Property 'throttle-group.{property}' not found"))),
            },
        }
        let mut all = Options::new();
        all.insert("limits".into(), limits.into());
        group.set_limits(throttle_limits(&all)).map_err(|err| of_error(&err))
    }
}

fn find<'a>(objects: &'a [Object], path: &str) -> Result<&'a Object, Refusal> {
    let id = path.strip_prefix("/objects/").unwrap_or(path);
    objects
        .iter()
        .find(|object| object.id == id)
        .ok_or_else(|| Refusal::device_not_found(format!("Device '{path}' not found")))
}

fn secret(options: &Options) -> Secret {
    let wrapped = options.text("format") == Some("base64") || options.contains_key("keyid");
    match (options.text("file"), options.text("data")) {
        _ if wrapped => Secret::Wrapped,
        (Some(file), _) => Secret::File(file.into()),
        (None, data) => Secret::Data(data.unwrap_or_default().to_owned()),
    }
}

/// The limits among the properties of a throttle group: in `limits`, or one by one as `x-iops-total` and so on.
fn throttle_limits(options: &Options) -> ThrottleLimits {
    let nested = options.object("limits");
    let number = |key: &str| {
        let own = format!("x-{key}");
        let given = nested.and_then(|limits| limits.get(key)).or_else(|| options.get(&own))?;
        // A negative limit is none that could be kept, and refused as one that is too large.
        Some(given.as_u64().unwrap_or(u64::MAX))
    };
    let limit = |name: &str| Limit {
        rate: number(name).unwrap_or(0),
        max: number(&format!("{name}-max")).unwrap_or(0),
        max_length: number(&format!("{name}-max-length")),
    };
    let directions = |unit: &str| Directions {
        total: limit(&format!("{unit}-total")),
        read: limit(&format!("{unit}-read")),
        write: limit(&format!("{unit}-write")),
    };
    ThrottleLimits {
        bps: directions("bps"),
        iops: directions("iops"),
        iops_size: number("iops-size").unwrap_or(0),
    }
}

fn shown_limits(limits: &ThrottleLimits) -> Value {
    let mut shown = Options::new();
    for (unit, directions) in [("iops", &limits.iops), ("bps", &limits.bps)] {
        for (direction, limit) in
            [("total", &directions.total), ("read", &directions.read), ("write", &directions.write)]
        {
            let name = format!("{unit}-{direction}");
            shown.insert(name.clone(), limit.rate.into());
            shown.insert(format!("{name}-max"), limit.max.into());
            shown.insert(format!("{name}-max-length"), limit.max_length.unwrap_or(1).into());
        }
    }
    shown.insert("iops-size".into(), limits.iops_size.into());
    shown.into()
}
