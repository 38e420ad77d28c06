//! `headwater jobs SOCKET`: the jobs of a running daemon, for people: list them, start, pause, limit, cancel and watch them, without typing JSON.

use super::reach::{parse_patience, show_patience};
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::size::{human, parse_size};
use clap::{Args, Subcommand};
use headwater_block::{Patience, SharedLimiter};
use headwater_job::GuestLatencyGoal;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the daemon's greeting may take. It greets at once, unless the monitor has a client already.
const GREETING: Duration = Duration::from_secs(5);

/// Arguments of `jobs`.
#[derive(Debug, Args)]
pub struct JobsArgs {
    /// The Unix socket of one of the daemon's monitors (--chardev socket,path=SOCKET,server=on,...).
    pub socket: PathBuf,
    /// What to do; by default the jobs are listed.
    #[command(subcommand)]
    pub command: Option<JobsCommand>,
}

/// What can be done.
#[derive(Debug, Clone, Subcommand)]
pub enum JobsCommand {
    /// List the jobs and how far they are.
    List {
        /// One line of JSON for each job.
        #[arg(long)]
        json: bool,
    },
    /// Start to stream into a node what its backing chain holds.
    Stream {
        /// The node.
        node: String,
        /// The job's name; by default the node's.
        #[arg(long)]
        id: Option<String>,
        /// Stream only what lies above this node.
        #[arg(long)]
        base: Option<String>,
        /// Copy at most so many bytes a second (50M).
        #[arg(long, value_parser = parse_size, default_value = "0")]
        rate: u64,
        /// Copy first what this boot trace names, in its order.
        #[arg(long, value_name = "FILE")]
        boot_trace: Option<PathBuf>,
    },
    /// Record in which order a node's guests read it for the first time, until it is told to end. The file is for --boot-trace.
    RecordBootTrace {
        /// The node.
        node: String,
        /// Where to; without it a recording ends, and what there is of it is written.
        file: Option<PathBuf>,
    },
    /// Hold requests of a node's clients for so long when its source can't be reached, before they fail.
    Hold {
        /// The node: a disk, or a source, which counts for all disks over it that have no time of their own.
        node: String,
        /// A number of seconds, `forever`, or `default`: as the daemon's --hold says.
        #[arg(value_parser = parse_hold)]
        time: Hold,
    },
    /// Let a job wait for so long when its source can't be reached, before its on-error counts.
    Wait {
        /// The job.
        id: String,
        /// A number of seconds, or `forever`.
        #[arg(value_parser = parse_patience)]
        time: Patience,
    },
    /// Copy nothing until resumed.
    Pause {
        /// The job.
        id: String,
    },
    /// Copy on.
    Resume {
        /// The job.
        id: String,
    },
    /// Copy at most RATE bytes a second from now on; 0 is without limit.
    Rate {
        /// The job.
        id: String,
        /// Bytes a second (50M).
        #[arg(value_parser = parse_size)]
        rate: u64,
    },
    /// Let all jobs together copy at most RATE bytes a second from now on, which they share by their weights; 0 is without limit.
    Limit {
        /// Bytes a second (50M).
        #[arg(value_parser = parse_size)]
        rate: u64,
    },
    /// Change a job's weight: of the limit for all jobs it gets twice what one of half its weight gets.
    Weight {
        /// The job.
        id: String,
        /// From 1 to 10000; a job has 100 by itself.
        #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
        weight: u32,
    },
    /// Let copies of a job add at most TIME to clients' requests from now on, 99 in 100 of them.
    GuestLatency {
        /// The job.
        id: String,
        /// A time (500us, 2ms), or `default`.
        #[arg(value_parser = crate::guest_latency::parse)]
        time: GuestLatencyGoal,
    },
    /// Give a job up; what it copied stays.
    Cancel {
        /// The job.
        id: String,
    },
    /// End a job that is ready: what it made takes its place.
    Complete {
        /// The job.
        id: String,
    },
    /// Make the result of a pending job final.
    Finalize {
        /// The job.
        id: String,
    },
    /// Forget a job that is over.
    Dismiss {
        /// The job.
        id: String,
    },
    /// Print what happens, one line for each event, until the job is over, or all are.
    Watch {
        /// The job; by default all.
        id: Option<String>,
    },
}

/// For how long requests are held: none is as the daemon's own option says.
#[derive(Debug, Clone, Copy)]
pub struct Hold(Option<Patience>);

fn parse_hold(text: &str) -> Result<Hold, String> {
    match text {
        "default" => Ok(Hold(None)),
        _ => parse_patience(text).map(|time| Hold(Some(time))),
    }
}

/// Names are relative to here, and the daemon may run elsewhere.
fn absolute(path: &Path) -> Outcome<String> {
    let absolute = std::path::absolute(path);
    let absolute = absolute.map_err(|err| Failure::new(format!("{}: {err}", path.display())))?;
    let text = absolute.to_str().map(str::to_owned);
    text.ok_or_else(|| Failure::new(format!("{}: QMP takes names in UTF-8 only", path.display())))
}

/// Does what the arguments say.
///
/// # Errors
/// If the daemon can't be reached, or refuses.
pub fn run(args: JobsArgs) -> Outcome {
    let mut daemon = Daemon::connect(&args.socket)?;
    let verb = |daemon: &mut Daemon, verb: &str, id: &str| daemon.command(verb, json!({"id": id})).map(drop);
    match args.command.unwrap_or(JobsCommand::List { json: false }) {
        JobsCommand::List { json } => list(&mut daemon, json),
        JobsCommand::Stream { node, id, base, rate, boot_trace } => {
            let mut arguments =
                json!({"job-id": id.as_ref().unwrap_or(&node), "device": node, "speed": rate});
            if let (Value::Object(arguments), Some(base)) = (&mut arguments, base) {
                arguments.insert("base-node".into(), base.into());
            }
            if let (Value::Object(arguments), Some(file)) = (&mut arguments, boot_trace) {
                arguments.insert("x-headwater-boot-trace".into(), absolute(&file)?.into());
            }
            daemon.command("block-stream", arguments).map(drop)
        }
        JobsCommand::Pause { id } => verb(&mut daemon, "job-pause", &id),
        JobsCommand::Resume { id } => verb(&mut daemon, "job-resume", &id),
        JobsCommand::Rate { id, rate } => {
            daemon.command("block-job-set-speed", json!({"device": id, "speed": rate})).map(drop)
        }
        JobsCommand::Limit { rate } => {
            daemon.command("headwater-set-job-limit", json!({"rate": rate})).map(drop)
        }
        JobsCommand::Weight { id, weight } => {
            daemon.command("headwater-set-job-weight", json!({"id": id, "weight": weight})).map(drop)
        }
        JobsCommand::GuestLatency { id, time } => {
            let arguments = match time {
                GuestLatencyGoal::Relative => json!({"id": id}),
                GuestLatencyGoal::Added(time) => json!({"id": id, "microseconds": time.as_micros() as u64}),
            };
            daemon.command("headwater-set-guest-latency", arguments).map(drop)
        }
        JobsCommand::RecordBootTrace { node, file } => {
            let mut arguments = json!({"node-name": node});
            if let (Value::Object(arguments), Some(file)) = (&mut arguments, file) {
                arguments.insert("file".into(), absolute(&file)?.into());
            }
            daemon.command("headwater-record-boot-trace", arguments).map(drop)
        }
        JobsCommand::Hold { node, time: Hold(time) } => {
            let mut arguments = json!({"node-name": node});
            if let (Value::Object(arguments), Some(time)) = (&mut arguments, time) {
                arguments.insert("hold".into(), show_patience(time).into());
            }
            daemon.command("headwater-set-hold", arguments).map(drop)
        }
        JobsCommand::Wait { id, time } => {
            daemon.command("headwater-set-job-hold", json!({"id": id, "hold": show_patience(time)})).map(drop)
        }
        JobsCommand::Cancel { id } => verb(&mut daemon, "job-cancel", &id),
        JobsCommand::Complete { id } => verb(&mut daemon, "job-complete", &id),
        JobsCommand::Finalize { id } => verb(&mut daemon, "job-finalize", &id),
        JobsCommand::Dismiss { id } => verb(&mut daemon, "job-dismiss", &id),
        JobsCommand::Watch { id } => watch(&mut daemon, id.as_deref()),
    }
}

fn list(daemon: &mut Daemon, as_json: bool) -> Outcome {
    let jobs = daemon.command("query-jobs", json!({}))?;
    let block_jobs = daemon.command("query-block-jobs", json!({}))?;
    let own = daemon.command("headwater-query", json!({}))?;
    let mut lines = String::new();
    for job in jobs.as_array().into_iter().flatten() {
        let text = |key: &str| job.get(key).and_then(Value::as_str).unwrap_or_default();
        let block_job =
            block_jobs.as_array().into_iter().flatten().find(|other| other.get("device") == job.get("id"));
        let number = |key: &str| block_job.and_then(|job| job.get(key)).and_then(Value::as_u64).unwrap_or(0);
        let own_of_job =
            own["jobs"].as_array().into_iter().flatten().find(|other| other.get("id") == job.get("id"));
        if as_json {
            let mut told = block_job.unwrap_or(job).clone();
            if let Value::Object(told) = &mut told {
                told.extend(own_of_job.and_then(Value::as_object).cloned().unwrap_or_default());
            }
            lines.push_str(&format!("{told}\n"));
            continue;
        }
        let (offset, len, speed) = (number("offset"), number("len"), number("speed"));
        let percent = (u128::from(offset) * 100).checked_div(u128::from(len)).unwrap_or(100);
        let limit = if speed > 0 { format!(", at most {}/s", human(speed)) } else { String::new() };
        let weight = own_of_job.and_then(|job| job["weight"].as_u64()).unwrap_or_default();
        let weight = match weight == u64::from(SharedLimiter::DEFAULT_WEIGHT) {
            true => String::new(),
            false => format!(", weight {weight}"),
        };
        let waits = match text("x-waiting-for") {
            "" => String::new(),
            what => format!(", waits for the {what}"),
        };
        let error =
            job.get("error").and_then(Value::as_str).map(|error| format!(": {error}")).unwrap_or_default();
        lines.push_str(&format!(
            "{}  {}  {}  {percent}% of {}{limit}{weight}{waits}{error}\n",
            text("id"),
            text("type"),
            text("status"),
            human(len),
        ));
    }
    if let Some(limit) = own["job-limit"].as_u64().filter(|limit| *limit > 0 && !as_json) {
        lines.push_str(&format!("all jobs together: at most {}/s\n", human(limit)));
    }
    output::print(lines.as_bytes())
}

/// Prints events until the job is no more.
fn watch(daemon: &mut Daemon, id: Option<&str>) -> Outcome {
    let jobs = daemon.command("query-jobs", json!({}))?;
    let known = |id: &str| {
        jobs.as_array().into_iter().flatten().any(|job| job.get("id").and_then(Value::as_str) == Some(id))
    };
    if let Some(id) = id.filter(|id| !known(id)) {
        return Err(Failure::new(format!("there is no job '{id}'")));
    }
    let mut left = jobs.as_array().map_or(0, Vec::len);
    while id.is_some() || left > 0 {
        let message = daemon.receive()?;
        let Some(event) = message.get("event").and_then(Value::as_str) else { continue };
        let data = message.get("data").cloned().unwrap_or_default();
        let of = data
            .get("id")
            .or_else(|| data.get("device"))
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        if id.is_some_and(|id| id != of) {
            continue;
        }
        output::print(format!("{event} {data}\n").as_bytes())?;
        match data.get("status").and_then(Value::as_str) {
            Some("null") if id.is_some() => return Ok(()),
            Some("null") => left = left.saturating_sub(1),
            Some("created") => left += 1,
            _ => {}
        }
    }
    Ok(())
}

/// A connection to a daemon's monitor.
struct Daemon {
    shown: String,
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Daemon {
    fn connect(path: &Path) -> Outcome<Self> {
        let shown = path.display().to_string();
        let stream = UnixStream::connect(path).map_err(|err| {
            Failure::new(format!("cannot connect to {shown}: {err}; is a daemon's monitor there?"))
        })?;
        let cannot = |err| Failure::new(format!("cannot use the socket {}: {err}", path.display()));
        let lines = BufReader::new(stream.try_clone().map_err(cannot)?);
        stream.set_read_timeout(Some(GREETING)).map_err(cannot)?;
        let mut daemon = Self { shown, stream, lines };
        daemon.receive()?;
        daemon.stream.set_read_timeout(None).map_err(cannot)?;
        daemon.command("qmp_capabilities", json!({}))?;
        Ok(daemon)
    }

    fn receive(&mut self) -> Outcome<Value> {
        let mut line = String::new();
        let lost = |why: &str| Failure::new(format!("{}: the connection was lost: {why}", self.shown));
        match self.lines.read_line(&mut line) {
            Ok(0) => Err(lost("the daemon has ended")),
            Ok(_) => serde_json::from_str(&line).map_err(|err| lost(&err.to_string())),
            Err(err) if err.kind() == ErrorKind::WouldBlock => Err(Failure::new(format!(
                "{}: no greeting: a monitor serves one client at a time, and this one has another; end that one, or give the daemon a second monitor",
                self.shown
            ))),
            Err(err) => Err(lost(&err.to_string())),
        }
    }

    /// Gives a command and waits for its answer; events in between are nobody's concern.
    fn command(&mut self, name: &str, arguments: Value) -> Outcome<Value> {
        let line = format!("{}\n", json!({"execute": name, "arguments": arguments}));
        self.stream
            .write_all(line.as_bytes())
            .map_err(|err| Failure::new(format!("{}: the connection was lost: {err}", self.shown)))?;
        loop {
            let mut answer = self.receive()?;
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = answer.get("error") {
                let desc = error.get("desc").and_then(Value::as_str).unwrap_or_default();
                return Err(Failure::new(format!("{}: {desc}", self.shown)));
            }
        }
    }
}
