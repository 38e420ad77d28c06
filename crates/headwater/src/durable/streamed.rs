//! What `headwater stream` remembers from one run to the next: which source DISK was begun with, the rate that was set, and whether it was paused.
//!
//! It lies beside DISK as `.DISK.headwater`, or in `--state-dir` as `DISK.job`. Beside the disk it moves with the disk, is found by whoever streams into
//! that disk, whatever user and home directory they have, and lies on the same storage. DISK's own lock sees to it that one process at a time
//! uses it. The file goes when everything has been copied.

use super::kept::Kept;
use super::record::{LinkChange, Record};
use super::state_dir::{Sharing, StateDir};
use super::storage::Storage;
use crate::cli::stream::StreamArgs;
use crate::display::Display;
use crate::failure::{Failure, Outcome};
use crate::mirrors::Mirrors;
use crate::overlay::Overlay;
use headwater_block::{Error, ErrorKind};
use serde_json::{Map, Value};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// What this command is called in a record.
const COMMAND: &str = "stream";

/// The name of the argument that was the rate.
const RATE: &str = "rate";

/// The name of the argument that was DISK, as an absolute path.
const DISK: &str = "disk";

/// The name of the argument that was the root of the manifest, and of what tells whether it counted from DISK's beginning.
const MANIFEST: &str = "manifest";
const WHOLE: &str = "verified-from-the-beginning";

/// What is remembered of an overlay that is about to be streamed into.
pub struct Streamed {
    /// Where it is kept; none if it can't be.
    pub kept: Option<Rc<Kept>>,
    /// In bytes per second; 0 is without limit.
    pub speed: u64,
    /// It was paused, and there is a way to resume it.
    pub paused: bool,
    /// If the source is verified: whether it has been since DISK was made.
    pub verified: Option<bool>,
}

/// Compares the overlay's source with what is remembered, and remembers it from now on. Nothing may have been copied or served yet.
///
/// # Errors
/// If the source has changed, what is remembered is no use or belongs to another disk, or nothing can be kept where the user wants it.
pub async fn remember(
    args: &StreamArgs,
    overlay: &Overlay,
    mirrors: Option<&Mirrors>,
    display: &Display,
) -> Outcome<Streamed> {
    let root = mirrors.and_then(Mirrors::root);
    let verified = root.as_ref().map(|_| overlay.made);
    let nothing = Streamed { kept: None, speed: args.copy.rate, paused: false, verified };
    let Some((dir, name)) = place(args)? else { return Ok(nothing) };
    let shown = dir.shown(&name);
    dir.clear(&name);
    let found = recorded(args, &dir, &name, &shown);
    if overlay.complete {
        // It was complete when the process that did it died. What isn't known as its record is left.
        if let Ok(Some(_)) = found
            && let Err(err) = dir.remove(&name)
        {
            display.say(&format!("{err}; it is of no use any more"));
        }
        return Ok(nothing);
    }
    let found = found?;
    let mut now = describe(args, overlay, mirrors).await?;
    // What a new disk was made from is what it is made from.
    let found = found.filter(|_| !overlay.made);
    if let Some(record) = &found {
        check_manifest(args, record, root.as_deref(), &shown)?;
        check_source(args, record, &now, &shown)?;
    }
    let then = |key| found.as_ref().and_then(|record| record.arguments.get(key));
    let verified = root.as_ref().map(|_| overlay.made || then(WHOLE) == Some(&Value::Bool(true)));
    if let (Some(root), Some(whole)) = (root, verified) {
        now.arguments.insert(MANIFEST.into(), root.into());
        now.arguments.insert(WHOLE.into(), whole.into());
    }
    if let Some(mirrors) = mirrors {
        // Those that can't be reached now must be the same when they can.
        for storage in found.iter().flat_map(|record| &record.read) {
            if mirrors.names(&storage.name) && !now.read.iter().any(|known| known.name == storage.name) {
                now.read.push(storage.clone());
            }
        }
        mirrors.pin(&now.read);
    }
    let (speed, paused) = match &found {
        // A rate that is given anew counts more than the one that was set while it ran.
        Some(then) if then.arguments.get(RATE) == now.arguments.get(RATE) => (then.speed, then.paused),
        Some(then) => (args.copy.rate, then.paused),
        None => (args.copy.rate, false),
    };
    let now = Record { speed, paused: paused && args.copy.control.is_some(), ..now };
    let kept = if found.as_ref() == Some(&now) {
        Kept::found(&dir, name, now)
    } else {
        match Kept::replace(&dir, name, now).await {
            Ok(kept) => kept,
            Err(err) if args.state_dir.is_none() && cannot_be_there(&err) => {
                display.say(&format!(
                    "{err}; so neither the source's identity nor a changed rate is remembered for another run (--state-dir DIR would keep it elsewhere)"
                ));
                return Ok(Streamed { speed, verified, ..nothing });
            }
            Err(err) => return Err(err.into()),
        }
    };
    let paused = kept.record().paused;
    Ok(Streamed { kept: Some(kept), speed, paused, verified })
}

/// The directory, and the name of the file. None for a device, beside which nothing lasts. DISK exists by now.
fn place(args: &StreamArgs) -> Outcome<Option<(Arc<StateDir>, String)>> {
    // One disk has one record, under whatever name it is opened.
    let disk = absolute(&args.disk)?;
    let Some(name) = disk.file_name().and_then(|name| name.to_str()) else {
        return match args.state_dir {
            Some(_) => {
                let disk = disk.display();
                Err(Failure::new(format!(
                    "{disk} can't be kept in a state directory: its name is not valid UTF-8"
                )))
            }
            None => Ok(None),
        };
    };
    if let Some(path) = &args.state_dir {
        return Ok(Some((Arc::new(StateDir::open(path, Sharing::Shared)?), format!("{name}.job"))));
    }
    if std::fs::metadata(&disk).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return Ok(None);
    }
    let dir = StateDir::beside(disk.parent().unwrap_or(Path::new("/")))?;
    Ok(Some((Arc::new(dir), format!(".{name}.headwater"))))
}

/// True if the directory takes no file of ours, for reasons that the user may not be able to change.
fn cannot_be_there(err: &Error) -> bool {
    matches!(err.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnly)
}

/// The record that is there. Refuses one that is no use, one of another command, and in a directory for many disks one of another disk.
fn recorded(args: &StreamArgs, dir: &StateDir, name: &str, shown: &str) -> Outcome<Option<Record>> {
    let Some(bytes) = dir.read(name)? else { return Ok(None) };
    let record = Record::decode(&bytes, shown).map_err(|err| {
        let (source, disk) = (&args.source, args.disk.display());
        Failure::new(format!("{err}; if {source} is still what {disk} was begun with, remove the file"))
    })?;
    if record.command != COMMAND {
        return Err(Failure::new(format!(
            "{shown} is the record of a job that the storage daemon started; give headwater stream another --state-dir"
        )));
    }
    let theirs = record.arguments.get(DISK).and_then(Value::as_str).unwrap_or_default();
    if args.state_dir.is_some() && Path::new(theirs) != absolute(&args.disk)? {
        return Err(Failure::new(format!(
            "{shown} is the record of {theirs}; give each of the two disks its own --state-dir, or remove the file if that disk is no more"
        )));
    }
    Ok(Some(record))
}

/// Refuses another manifest than the one that DISK was begun with.
fn check_manifest(args: &StreamArgs, then: &Record, now: Option<&str>, shown: &str) -> Outcome {
    let Some(then) = then.arguments.get(MANIFEST).and_then(Value::as_str) else { return Ok(()) };
    if now == Some(then) {
        return Ok(());
    }
    let disk = args.disk.display();
    let is = now.map_or("none is given now".to_owned(), |now| format!("{now} is given now"));
    Err(Failure::new(format!(
        "{disk} was begun with --verify and a manifest with the root {then}, and {is}; go on with that manifest, or choose another DISK ({shown} remembers it)"
    )))
}

/// Refuses a source that isn't what it was.
fn check_source(args: &StreamArgs, then: &Record, now: &Record, shown: &str) -> Outcome {
    let disk = args.disk.display();
    let several = then.read.len() != now.read.len();
    for (at, now) in now.read.iter().enumerate() {
        // One source may be called otherwise than before; of several, each is compared with what is known of it.
        let same = then.read.iter().find(|then| then.name == now.name);
        let Some(then) =
            same.or_else(|| then.read.get(at).filter(|_| !several && args.copy.mirrors.mirror.is_empty()))
        else {
            continue;
        };
        if let Some(difference) = then.difference(now) {
            return Err(Failure::new(format!(
                "{} has changed since {disk} was begun: {difference}. What was copied from it and what it holds now don't belong together. Bring back \
                 what it was, or choose another DISK; if it is known to hold the same bytes all the same, or {disk} was made anew, remove {shown}",
                now.name
            )));
        }
    }
    Ok(())
}

/// The record of a stream that starts now.
async fn describe(args: &StreamArgs, overlay: &Overlay, mirrors: Option<&Mirrors>) -> Outcome<Record> {
    let mut arguments = Map::new();
    arguments.insert("source".into(), args.source.clone().into());
    arguments.insert(DISK.into(), absolute(&args.disk)?.to_string_lossy().into());
    arguments.insert(RATE.into(), args.copy.rate.into());
    let mut read = Vec::new();
    let of_mirrors = mirrors.map(Mirrors::open_nodes).unwrap_or_default();
    for (name, node) in &of_mirrors {
        read.push(Storage::constant(name, &**node).await?);
    }
    for (name, node) in &overlay.sources {
        if !of_mirrors.is_empty() && mirrors.is_some_and(|mirrors| mirrors.is_source(name)) {
            continue;
        }
        read.push(Storage::constant(name, &**node).await?);
    }
    let disk = args.disk.display().to_string();
    Ok(Record {
        command: COMMAND.into(),
        id: disk.clone(),
        arguments,
        speed: args.copy.rate,
        paused: false,
        weight: None,
        hold: None,
        boot_trace: None,
        link: LinkChange {
            was: overlay.link.clone(),
            becomes: overlay.base.as_ref().map(|base| base.link.name.clone()),
        },
        written: vec![Storage::changing(&disk, &*overlay.file)?],
        read,
    })
}

/// A path that means the same from every directory, and is the only one.
fn absolute(path: &Path) -> Outcome<PathBuf> {
    std::fs::canonicalize(path)
        .map_err(|err| Failure::new(format!("cannot find out where {} is: {err}", path.display())))
}
