//! `--chardev BACKEND,id=ID,...`.

use serde_json::{Map, Value, json};

use super::{Keys, Kind, Opts};
use crate::error::QmpError;
use crate::option;
use crate::schema::{self, Source};

/// Every key that some backend takes. A key that another backend takes is ignored, as QEMU ignores it.
const KEYS: Keys = &[
    ("backend", Kind::Text),
    ("id", Kind::Text),
    ("path", Kind::Text),
    ("input-path", Kind::Text),
    ("host", Kind::Text),
    ("port", Kind::Text),
    ("fd", Kind::Text),
    ("localaddr", Kind::Text),
    ("localport", Kind::Text),
    ("to", Kind::Number),
    ("ipv4", Kind::Switch),
    ("ipv6", Kind::Switch),
    ("wait", Kind::Switch),
    ("server", Kind::Switch),
    ("delay", Kind::Switch),
    ("nodelay", Kind::Switch),
    ("reconnect", Kind::Number),
    ("reconnect-ms", Kind::Number),
    ("telnet", Kind::Switch),
    ("tn3270", Kind::Switch),
    ("tls-creds", Kind::Text),
    ("tls-authz", Kind::Text),
    ("websocket", Kind::Switch),
    ("width", Kind::Number),
    ("height", Kind::Number),
    ("cols", Kind::Number),
    ("rows", Kind::Number),
    ("mux", Kind::Switch),
    ("signal", Kind::Switch),
    ("name", Kind::Text),
    ("debug", Kind::Number),
    ("size", Kind::Size),
    ("chardev", Kind::Text),
    ("append", Kind::Switch),
    ("logfile", Kind::Text),
    ("logappend", Kind::Switch),
    ("mouse", Kind::Switch),
    ("clipboard", Kind::Switch),
    ("abstract", Kind::Switch),
    ("tight", Kind::Switch),
];

/// What `--chardev` asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Chardev {
    /// The name of the device.
    pub id: String,
    /// The `ChardevBackend` that QEMU's `chardev-add` would have been given, checked.
    pub backend: Value,
    /// What to warn of.
    pub warnings: Vec<String>,
}

/// What a value of `--chardev` says.
#[derive(Clone, Debug, PartialEq)]
pub enum ParsedChardev {
    /// A device.
    Chardev(Chardev),
    /// It asks for help: about the option, or with nothing but `help` for the list of backends.
    Help,
}

/// Reads the value of `--chardev`.
pub fn parse_chardev(text: &str) -> Result<ParsedChardev, QmpError> {
    let opts = Opts::parse(text, "backend")?;
    if opts.help {
        return Ok(ParsedChardev::Help);
    }
    // The id is looked at before anything else, and its first value counts.
    let id = opts.pairs.iter().find(|(key, _)| key == "id").map(|(_, id)| id.clone());
    if let Some(id) = &id {
        option::check_identifier("id", id)?;
    }
    opts.check(KEYS)?;
    let id = id.ok_or_else(|| QmpError::generic("chardev: no id specified"))?;
    let name =
        opts.get("backend").ok_or_else(|| QmpError::generic(format!("chardev: \"{id}\" missing backend")))?;
    let mut data = Map::new();
    put(&mut data, "logfile", opts.text("logfile"));
    put(&mut data, "logappend", opts.switched("logappend"));
    match name {
        "null" => {}
        "stdio" => put(&mut data, "signal", opts.switched("signal")),
        "pty" => put(&mut data, "path", opts.text("path")),
        "file" => {
            let out = opts.text("path").ok_or_else(|| lacks("file", "filename"))?;
            put(&mut data, "out", Some(out));
            put(&mut data, "in", opts.text("input-path"));
            put(&mut data, "append", opts.switched("append"));
        }
        "pipe" => {
            let device = opts.text("path").ok_or_else(|| lacks("pipe", "device path"))?;
            put(&mut data, "device", Some(device));
        }
        "socket" => socket(&opts, &mut data)?,
        other => return Err(QmpError::generic(format!("'{other}' is not a valid char driver name"))),
    }
    let backend = json!({ "type": name, "data": data });
    let backend = schema::check_type("ChardevBackend", backend, Source::Json)?;
    Ok(ParsedChardev::Chardev(Chardev { id, backend, warnings: opts.warnings }))
}

fn socket(opts: &Opts, data: &mut Map<String, Value>) -> Result<(), QmpError> {
    let path = opts.text("path");
    let host = opts.text("host");
    let fd = opts.text("fd");
    let address = match (path, host, fd) {
        (Some(path), None, None) => {
            let mut unix = Map::new();
            put(&mut unix, "path", Some(path));
            put(&mut unix, "abstract", opts.switched("abstract"));
            put(&mut unix, "tight", opts.switched("tight"));
            json!({ "type": "unix", "data": unix })
        }
        (None, Some(host), None) => {
            let port = opts.text("port").ok_or_else(|| lacks("socket", "port"))?;
            let mut inet = Map::new();
            put(&mut inet, "host", Some(host));
            put(&mut inet, "port", Some(port));
            // Sixteen bits of it count.
            put(&mut inet, "to", opts.number("to").map(|to| to & 0xffff));
            put(&mut inet, "ipv4", opts.switched("ipv4"));
            put(&mut inet, "ipv6", opts.switched("ipv6"));
            json!({ "type": "inet", "data": inet })
        }
        (None, None, fd) => json!({ "type": "fd", "data": { "str": fd.unwrap_or_default() } }),
        _ => {
            return Err(QmpError::generic("None or one of 'path', 'fd' or 'host' option required."));
        }
    };
    data.insert("addr".to_owned(), address);
    for key in ["server", "wait", "telnet", "tn3270", "websocket"] {
        put(data, key, opts.switched(key));
    }
    let nodelay = opts.switched("nodelay").or_else(|| opts.switched("delay").map(|delay| !delay));
    put(data, "nodelay", nodelay);
    for key in ["tls-creds", "tls-authz"] {
        put(data, key, opts.text(key));
    }
    for key in ["reconnect", "reconnect-ms"] {
        put(data, key, opts.number(key).map(u64::cast_signed));
    }
    Ok(())
}

fn lacks(backend: &str, what: &str) -> QmpError {
    QmpError::generic(format!("chardev: {backend}: no {what} given"))
}

fn put<T: Into<Value>>(members: &mut Map<String, Value>, key: &str, value: Option<T>) {
    if let Some(value) = value {
        members.insert(key.to_owned(), value.into());
    }
}
