//! The daemon's command line: `qemu-storage-daemon`'s options in their order, and a few of our own.

use super::graph::open::Options;
use crate::cli::reach::parse_patience;
use crate::failure::{Failure, Outcome};
use crate::size::parse_size;
use headwater_block::Patience;
use headwater_qmp::QmpError;
use headwater_qmp::option::{self, OptionKind, Parsed};
use headwater_qmp::opts::{self, ParsedChardev, Trace};
use std::ffi::OsString;

/// What the command line asks for.
pub(super) enum CommandLine {
    /// To run.
    Run(Line),
    /// To print this and end.
    Print(String),
}

/// Whether there is to be a sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Wish {
    /// If the system has what it takes.
    #[default]
    Auto,
    /// There must be.
    On,
    /// No.
    Off,
}

/// What is to be set up, and how.
#[derive(Default)]
pub(super) struct Line {
    /// In the order of the command line.
    pub(super) settings: Vec<Setting>,
    pub(super) trace: Vec<Trace>,
    pub(super) daemonize: bool,
    pub(super) pidfile: Option<String>,
    pub(super) allow_backing: Vec<String>,
    pub(super) state_dir: Option<String>,
    pub(super) cache_dir: Option<String>,
    /// In bytes; none is the default.
    pub(super) cache_size: Option<u64>,
    /// In bytes; 0 is nothing.
    pub(super) low_water: u64,
    /// In bytes; none is the default.
    pub(super) share_memory: Option<u64>,
    pub(super) sandbox: Wish,
    pub(super) hold: Patience,
    /// In bytes per second; 0 is without limit.
    pub(super) job_limit: u64,
}

/// One thing that is set up, with the text that asked for it.
pub(super) enum Setting {
    Blockdev(Options, String),
    Object(Options, String),
    NbdServer(Options, String),
    Export(Options, String),
    Chardev(opts::Chardev, String),
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
const WITH_VALUE: [&str; 17] = [
    "blockdev",
    "chardev",
    "export",
    "monitor",
    "nbd-server",
    "object",
    "pidfile",
    "trace",
    "allow-backing",
    "state-dir",
    "share-memory",
    "low-water",
    "cache-dir",
    "cache-size",
    "sandbox",
    "hold",
    "job-limit",
];

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
                         add a block node. Drivers: file, host_device, raw, qcow2, nbd, http, https, s3, gs, az, null-co, null-aio,
                         copy-on-read, throttle, blkdebug, blkverify, replicas, verify
  --object [qom-type=]TYPE,id=ID[,...]
                         add an object: throttle-group, secret, iothread, tls-creds-x509, tls-creds-psk
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,tls-creds=ID][,max-connections=N]
  --nbd-server addr.type=unix,addr.path=PATH[,tls-creds=ID][,max-connections=N]
                         start the NBD server
  --export [type=]nbd,id=ID,node-name=NAME[,name=EXPORT][,writable=on|off]
                         export a block node over NBD
  --export [type=]vhost-user-blk,id=ID,node-name=NAME,addr.type=unix,addr.path=PATH[,num-queues=N][,logical-block-size=N]
           [,writable=on|off][,writethrough=on|off]
                         export a block node to a virtual machine
  --export [type=]fuse,id=ID,node-name=NAME,mountpoint=FILE[,growable=on|off][,writable=on|off][,allow-other=on|off|auto]
                         export a block node as the regular file FILE
  --chardev socket,id=ID,path=PATH|host=HOST,port=PORT[,server=on|off][,wait=on|off][,reconnect-ms=N]
  --chardev stdio,id=ID  make a place where a monitor is reached
  --monitor [chardev=]ID[,pretty=on|off]
                         speak QMP there

  --daemonize            go on in the background once everything is set up
  --pidfile FILE         write the process's number to FILE
  --allow-backing NAME   let images name this file, directory or URI as backing or data file; without it, only files in an image's own
                         directory are followed. May be given several times
  --state-dir DIR        keep the jobs of block-stream and block-commit (but of the active layer) in DIR, which is made: when the daemon is
                         started again with it, whatever ended it, they go on as soon as their nodes are there
  --share-memory SIZE    keep at most so much (256M) of what disks read of remote backing nodes in memory, for other disks on the same nodes: disks
                         that are streamed from one source at once ask it once. 0 shares only what is in flight
  --cache-dir DIR        keep in DIR, which is made, what is read of remote backing nodes whose contents have a mark (an ETag), for other disks, other
                         daemons and another day
  --cache-size SIZE      let DIR take at most so much (32G); what was unused the longest goes first
  --hold SECONDS|forever when a source can't be reached, hold clients' requests for so long instead of failing them, and let jobs wait; both go on
                         by themselves. Without this option nothing is held
  --job-limit RATE       let all jobs together copy at most so many bytes a second (50M), whatever each may by itself; they share it by their weights
  --low-water SIZE       let streams leave so much free where they write: they wait before it is less, and go on when there is room
  --sandbox on|off       what reads images and talks to clients can't open files that nobody named, nor run programs. Without this option: on
                         if the kernel has what it takes
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
                None => return Err(wrong(&format!("{argument}: Unexpected argument"))),
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
            if let Some(help) = take(&mut line, name, value)? {
                return Ok(CommandLine::Print(help));
            }
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
        _ if matching.contains(&name) => {
            Ok(matching.into_iter().find(|option| *option == name).unwrap_or("help"))
        }
        [] => Err(wrong(&format!("unrecognized option '--{name}'"))),
        _ => Err(wrong(&format!("option '--{name}' is ambiguous: {}", matching.join(", ")))),
    }
}

fn wrong(what: &str) -> Failure {
    Failure::new(what)
}

/// Takes one option; gives the help that it asks for instead, if it does.
fn take(line: &mut Line, name: &'static str, value: String) -> Outcome<Option<String>> {
    let refuse = |err: QmpError| Failure::new(format!("--{name} {value}: {}", err.desc));
    let kind = match name {
        "blockdev" => OptionKind::Blockdev,
        "object" => OptionKind::Object,
        "nbd-server" => OptionKind::NbdServer,
        "export" => OptionKind::Export,
        "monitor" => OptionKind::Monitor,
        "chardev" => {
            match opts::parse_chardev(&value).map_err(refuse)? {
                ParsedChardev::Chardev(chardev) => line.settings.push(Setting::Chardev(chardev, value)),
                ParsedChardev::Help => {
                    return Ok(Some("Available chardev backend types: \n  null\n  socket\n  stdio\n".into()));
                }
            }
            return Ok(None);
        }
        "trace" => {
            let trace = opts::parse_trace(&value).map_err(refuse)?;
            if trace.help
                || trace.enable.as_deref().is_some_and(|pattern| pattern == "help" || pattern == "?")
            {
                return Ok(Some(super::trace::EVENTS.map(|name| format!("{name}\n")).concat()));
            }
            line.trace.push(trace);
            return Ok(None);
        }
        "pidfile" => {
            line.pidfile = Some(value);
            return Ok(None);
        }
        "state-dir" => {
            line.state_dir = Some(value);
            return Ok(None);
        }
        "cache-dir" => {
            line.cache_dir = Some(value);
            return Ok(None);
        }
        "cache-size" => {
            line.cache_size = Some(parse_size(&value).map_err(|why| wrong(&why))?);
            return Ok(None);
        }
        "low-water" => {
            line.low_water = parse_size(&value).map_err(|why| wrong(&why))?;
            return Ok(None);
        }
        "job-limit" => {
            line.job_limit = parse_size(&value).map_err(|why| wrong(&why))?;
            return Ok(None);
        }
        "share-memory" => {
            line.share_memory = Some(parse_size(&value).map_err(|why| wrong(&why))?);
            return Ok(None);
        }
        "sandbox" => {
            line.sandbox = match &value[..] {
                "on" => Wish::On,
                "off" => Wish::Off,
                _ => return Err(wrong("--sandbox expects 'on' or 'off'")),
            };
            return Ok(None);
        }
        "hold" => {
            line.hold = parse_patience(&value).map_err(|err| wrong(&format!("--hold: {err}")))?;
            return Ok(None);
        }
        _ => {
            line.allow_backing.push(value);
            return Ok(None);
        }
    };
    let options = match option::parse(kind, &value).map_err(refuse)? {
        Parsed::Value(options) => options,
        Parsed::Help(asked) if kind == OptionKind::Object => {
            return Ok(Some(object_help(asked.get("qom-type").and_then(|of| of.as_str()))));
        }
        Parsed::Help(_) => {
            return Err(Failure::new(format!("--{name} {value}: Help is not available for this option")));
        }
    };
    line.settings.push(match kind {
        OptionKind::Blockdev => Setting::Blockdev(options, value),
        OptionKind::Object => Setting::Object(options, value),
        OptionKind::NbdServer => Setting::NbdServer(options, value),
        OptionKind::Export => Setting::Export(options, value),
        OptionKind::Monitor => Setting::Monitor(options, value),
    });
    Ok(None)
}

/// The object types that there are, or the properties of one.
fn object_help(of: Option<&str>) -> String {
    const LIMITS: [&str; 6] = ["bps-read", "bps-total", "bps-write", "iops-read", "iops-total", "iops-write"];
    let tls = ["dir=<string>", "endpoint=<QCryptoTLSCredsEndpoint>", "priority=<string>"].map(str::to_owned);
    let properties: Vec<String> = match of {
        None => {
            return "List of user creatable objects:\n  iothread\n  secret\n  throttle-group\n  tls-creds-psk\n  tls-creds-x509\n".into();
        }
        Some("throttle-group") => {
            let one = |name: &str| {
                [
                    format!("x-{name}=<int>"),
                    format!("x-{name}-max=<int>"),
                    format!("x-{name}-max-length=<int>"),
                ]
            };
            let all = LIMITS.iter().flat_map(|name| one(name));
            std::iter::once("limits=<ThrottleLimits>".to_owned()).chain(all).collect()
        }
        Some("secret") => vec!["data=<string>".into(), "file=<string>".into()],
        Some("tls-creds-x509") => [&tls[..], &["verify-peer=<bool>".into()]].concat(),
        Some("tls-creds-psk") => {
            [&tls[..], &["username=<string>".into(), "verify-peer=<bool>".into()]].concat()
        }
        Some(_) => Vec::new(),
    };
    let listed: String = properties.iter().map(|property| format!("  {property}\n")).collect();
    format!("{} options:\n{listed}", of.unwrap_or_default())
}
