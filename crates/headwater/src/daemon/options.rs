//! The daemon's command line: `qemu-storage-daemon`'s options in their order, and a few of our own.

use super::chardev::ChardevOptions;
use super::graph::open::Options;
use crate::failure::{Failure, Outcome};
use headwater_qmp::schema::{self, Source};
use headwater_qmp::{QmpError, keyval};
use serde_json::Value;
use std::ffi::OsString;

/// What the command line asks for.
pub(super) enum CommandLine {
    /// To run.
    Run(Line),
    /// To print this and end.
    Print(String),
}

/// What is to be set up, and how.
#[derive(Default)]
pub(super) struct Line {
    /// In the order of the command line.
    pub(super) settings: Vec<Setting>,
    pub(super) trace: Vec<String>,
    pub(super) daemonize: bool,
    pub(super) pidfile: Option<String>,
    pub(super) allow_backing: Vec<String>,
}

/// One thing that is set up, with the text that asked for it.
pub(super) enum Setting {
    Blockdev(Options, String),
    Object(Options, String),
    NbdServer(Options, String),
    Export(Options, String),
    Chardev(ChardevOptions, String),
    Monitor(Options, String),
}

impl Setting {
    /// As it stands on the command line.
    pub(super) fn shown(&self) -> String {
        let (option, text) = match self {
            Self::Blockdev(_, text) => ("blockdev", text),
            Self::Object(_, text) => ("object", text),
            Self::NbdServer(_, text) => ("nbd-server", text),
            Self::Export(_, text) => ("export", text),
            Self::Chardev(_, text) => ("chardev", text),
            Self::Monitor(_, text) => ("monitor", text),
        };
        format!("--{option} {text}")
    }
}

/// Options that take a value.
const WITH_VALUE: [&str; 9] =
    ["blockdev", "chardev", "export", "monitor", "nbd-server", "object", "pidfile", "trace", "allow-backing"];

/// What `--help` prints.
pub const HELP: &str = "\
Usage: headwater-storage-daemon [options]
       headwater daemon [options]
Serves disk images and works on them, controlled by QMP; takes the options and speaks the QMP of qemu-storage-daemon.

  -h, --help             print this and exit
  -V, --version          print the version and exit
  -T, --trace [enable=]PATTERN[,file=FILE]
                         tell what happens inside, for the events that match (stream_*, job_*, qmp_*), to stderr or FILE

  --blockdev [driver=]DRIVER[,node-name=NAME][,read-only=on|off][,...] or JSON
                         add a block node. Drivers: file, host_device, raw, qcow2, nbd, http, https, null-co, null-aio, copy-on-read,
                         throttle, blkdebug, blkverify
  --object [qom-type=]TYPE,id=ID[,...]
                         add an object: throttle-group, secret, iothread, tls-creds-x509, tls-creds-psk
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,tls-creds=ID][,max-connections=N]
  --nbd-server addr.type=unix,addr.path=PATH[,tls-creds=ID][,max-connections=N]
                         start the NBD server
  --export [type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,writable=on|off]
                         export a block node over NBD
  --chardev socket,id=ID,path=PATH|host=HOST,port=PORT[,server=on|off][,wait=on|off][,reconnect-ms=N]
  --chardev stdio,id=ID  make a place where a monitor is reached
  --monitor [chardev=]ID[,pretty=on|off]
                         speak QMP there

  --daemonize            go on in the background once everything is set up
  --pidfile FILE         write the process's number to FILE
  --allow-backing NAME   let images name this file, directory or URI as backing or data file; without it, only files in an image's own
                         directory are followed. May be given several times
";

/// Reads the command line.
///
/// # Errors
/// Says what is wrong, and with which option.
pub(super) fn parse(arguments: &[OsString]) -> Outcome<CommandLine> {
    let mut line = Line::default();
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let argument = text(argument)?;
        let (name, inline) = match argument.split_once('=') {
            Some((name, value)) if argument.starts_with("--") => (name, Some(value.to_owned())),
            _ => (argument, None),
        };
        let name = match name {
            "-h" | "-?" => "help",
            "-V" => "version",
            "-T" => "trace",
            _ => match name.strip_prefix("--") {
                Some(name) => full_name(name)?,
                None => return Err(wrong(&format!("Unexpected argument: {argument}"))),
            },
        };
        if WITH_VALUE.contains(&name) {
            let value = match inline {
                Some(value) => value,
                None => match arguments.next() {
                    Some(value) => text(value)?.to_owned(),
                    None => return Err(wrong(&format!("option '--{name}' requires an argument"))),
                },
            };
            if let Some(help) = help_of(name, &value) {
                return Ok(CommandLine::Print(help));
            }
            take(&mut line, name, value)?;
        } else if inline.is_some() {
            return Err(wrong(&format!("option '--{name}' doesn't allow an argument")));
        } else {
            match name {
                "help" => return Ok(CommandLine::Print(HELP.to_owned())),
                "version" => {
                    let version = env!("CARGO_PKG_VERSION");
                    return Ok(CommandLine::Print(format!("headwater-storage-daemon version {version}\n")));
                }
                _ => line.daemonize = true,
            }
        }
    }
    Ok(CommandLine::Run(line))
}

fn text(argument: &OsString) -> Outcome<&str> {
    argument.to_str().ok_or_else(|| wrong("the command line is not valid UTF-8"))
}

/// The option that `name` begins, if that is clear.
fn full_name(name: &str) -> Outcome<&'static str> {
    let all = WITH_VALUE.into_iter().chain(["help", "version", "daemonize"]);
    let matching: Vec<&'static str> = all.filter(|option| option.starts_with(name)).collect();
    match matching[..] {
        [only] => Ok(only),
        _ if matching.contains(&name) => Ok(matching.into_iter().find(|option| *option == name).unwrap_or("help")),
        [] => Err(wrong(&format!("unrecognized option '--{name}'"))),
        _ => Err(wrong(&format!("option '--{name}' is ambiguous: {}", matching.join(", ")))),
    }
}

fn wrong(what: &str) -> Failure {
    Failure::new(format!("{what}; try --help"))
}

/// `--object help`, `--chardev help` and the like.
fn help_of(name: &str, value: &str) -> Option<String> {
    let asked = |text: &str| text == "help" || text == "?";
    match (name, value.split_once(',')) {
        ("object", None) if asked(value) => Some(
            "List of user creatable objects:\n  iothread\n  secret\n  throttle-group\n  tls-creds-psk\n  tls-creds-x509\n".into(),
        ),
        ("object", Some((kind, rest))) if asked(rest) => Some(object_help(kind)),
        ("chardev", None) if asked(value) => Some("Available chardev backend types:\n  socket\n  stdio\n".into()),
        ("trace", None) if asked(value) => Some(super::trace::EVENTS.map(|name| format!("{name}\n")).concat()),
        _ => None,
    }
}

fn object_help(kind: &str) -> String {
    let properties = schema::object_properties(kind).unwrap_or_default();
    let listed: String = properties.iter().map(|(name, of)| format!("  {name}=<{of}>\n")).collect();
    format!("{kind} options:\n{listed}")
}

fn take(line: &mut Line, name: &'static str, value: String) -> Outcome {
    let refuse = |err: QmpError| Failure::new(format!("--{name} {value}: {}", err.desc));
    let checked = |type_name: &str, implied: &str| match option_tree(&value, implied)
        .and_then(|(tree, source)| schema::check_type(type_name, tree, source))
    {
        Ok(Value::Object(options)) => Ok(options),
        Ok(_) => Err(Failure::new(format!("--{name} {value}: expected options"))),
        Err(err) => Err(refuse(err)),
    };
    match name {
        "blockdev" => line.settings.push(Setting::Blockdev(checked("BlockdevOptions", "driver")?, value)),
        "object" => line.settings.push(Setting::Object(checked("ObjectOptions", "qom-type")?, value)),
        "nbd-server" => line.settings.push(Setting::NbdServer(checked("NbdServerOptions", "")?, value)),
        "export" => line.settings.push(Setting::Export(checked("BlockExportOptions", "type")?, value)),
        "monitor" => line.settings.push(Setting::Monitor(checked("MonitorOptions", "chardev")?, value)),
        "chardev" => {
            let options = keyval::parse_opts(&value, Some("backend")).map_err(refuse)?;
            line.settings.push(Setting::Chardev(options, value));
        }
        "pidfile" => line.pidfile = Some(value),
        "trace" => line.trace.push(value),
        _ => line.allow_backing.push(value),
    }
    Ok(())
}

/// An option's value as a tree: JSON if it begins like that, else keys and values.
fn option_tree(value: &str, implied: &str) -> Result<(Value, Source), QmpError> {
    if value.starts_with('{') {
        return keyval::parse_json(value).map(|tree| (tree, Source::Json));
    }
    let implied = (!implied.is_empty()).then_some(implied);
    keyval::parse(value, implied).map(|tree| (tree, Source::Keyval))
}
