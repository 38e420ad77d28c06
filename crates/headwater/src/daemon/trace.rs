//! `--trace`: events of the inside under QEMU's names, for those who look for faults. They are `tracing` events of the target
//! [`TARGET`], whose field `event` is the name.

use crate::failure::{Failure, Outcome};
use headwater_qmp::opts::Trace;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, OnceLock};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer};

/// The target of traced events.
pub(crate) const TARGET: &str = "qemu";

/// The names of the events that there are.
pub(super) const EVENTS: [&str; 12] = [
    "bdrv_co_pdiscard",
    "bdrv_co_preadv_part",
    "bdrv_co_pwrite_zeroes",
    "bdrv_co_pwritev_part",
    "commit_start",
    "handle_qmp_command",
    "job_apply_verb",
    "job_state_transition",
    "mirror_start",
    "monitor_protocol_event_emit",
    "stream_one_iteration",
    "stream_start",
];

/// Which events go where.
struct Sink {
    patterns: Vec<String>,
    file: Option<Mutex<File>>,
}

static SINK: OnceLock<Sink> = OnceLock::new();

/// Switches events on as the values of `--trace` say.
///
/// # Errors
/// If a file can't be opened.
pub(super) fn start(options: &[Trace]) -> Outcome {
    if options.is_empty() {
        return Ok(());
    }
    let mut sink = Sink { patterns: Vec::new(), file: None };
    for Trace { enable, events, file, .. } in options {
        if let Some(path) = file {
            let file = File::create(path)
                .map_err(|err| Failure::new(format!("--trace: cannot write {path}: {err}")))?;
            sink.file = Some(Mutex::new(file));
        }
        if let Some(path) = events {
            let list = std::fs::read_to_string(path)
                .map_err(|err| Failure::new(format!("--trace: cannot read {path}: {err}")))?;
            let lines = list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
            sink.patterns.extend(lines.map(str::to_owned));
        }
        sink.patterns.extend(enable.clone());
    }
    // The command line is read once.
    let _ = SINK.set(sink);
    Ok(())
}

/// Writes the events that were switched on.
pub(crate) struct TraceLayer;

impl<S: tracing::Subscriber> Layer<S> for TraceLayer {
    fn on_event(&self, event: &tracing::Event<'_>, _context: Context<'_, S>) {
        let Some(sink) = SINK.get().filter(|_| event.metadata().target() == TARGET) else { return };
        let mut shown = Shown::default();
        event.record(&mut shown);
        let on = sink.patterns.iter().fold(false, |on, pattern| match pattern.strip_prefix('-') {
            Some(off) if matches(off, &shown.event) => false,
            None if matches(pattern, &shown.event) => true,
            _ => on,
        });
        if !on {
            return;
        }
        let line = format!("{}{}\n", shown.event, shown.fields);
        // Nothing can be done about a trace that can't be written.
        let _ = match &sink.file {
            Some(file) => file.lock().map(|mut file| file.write_all(line.as_bytes())).is_ok(),
            None => std::io::stderr().write_all(line.as_bytes()).is_ok(),
        };
    }
}

#[derive(Default)]
struct Shown {
    event: String,
    fields: String,
}

impl Visit for Shown {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "event" {
            self.event = format!("{value:?}").trim_matches('"').to_owned();
        } else {
            // Writing to a string doesn't fail.
            let _ = write!(self.fields, " {} {value:?}", field.name());
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "event" {
            self.event = value.to_owned();
        } else {
            let _ = write!(self.fields, " {} {value}", field.name());
        }
    }
}

/// True if `name` is what `pattern` means, in which `*` stands for anything.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => {
            name.starts_with(start)
                && (start.len()..=name.len()).any(|at| name.get(at..).is_some_and(|end| matches(rest, end)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn a_star_stands_for_anything() {
        for (pattern, name, expected) in [
            ("stream_*", "stream_start", true),
            ("*_start", "stream_start", true),
            ("*", "", true),
            ("a*c", "axb", false),
            ("a", "ab", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
