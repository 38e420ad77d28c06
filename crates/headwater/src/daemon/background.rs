//! Leaving the terminal: `--daemonize` and `--pidfile`.
//!
//! A process with threads can't fork safely, so the program starts itself again: the child sets everything up and says so through a
//! pipe, its standard output, and only then does the command that the user typed end. Errors of the setup are still the user's to see.

use crate::failure::{Failure, Outcome};
use rustix::fs::{CWD, RenameFlags};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Tells a child that it is one.
const MARK: &str = "HEADWATER_IN_BACKGROUND";

/// How the one who started us learns that we are ready.
pub(super) struct Started(bool);

impl Started {
    /// Everything is set up. `and_leave`: what else must let the terminal go.
    pub(super) fn tell(self, and_leave: impl FnOnce()) {
        if !self.0 {
            return;
        }
        and_leave();
        let told = std::io::stdout().write_all(b"r").and_then(|()| std::io::stdout().flush());
        if told.is_err() {
            tracing::debug!("nobody waits for the start");
        }
        leave_terminal();
    }
}

/// Lets the terminal go: standard input, output and error lead nowhere from now on.
pub(super) fn leave_terminal() {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        // If these fail, we keep it.
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}

/// Goes to the background if asked to. None in the process that stays in front, when the other is ready.
///
/// # Errors
/// If no process can be started, or it failed, having said why.
pub(super) fn enter(daemonize: bool, arguments: &[OsString]) -> Outcome<Option<Started>> {
    if !daemonize {
        return Ok(Some(Started(false)));
    }
    if std::env::var_os(MARK).is_some() {
        // A session of its own, without a terminal. It fails only if we lead one already.
        let _ = rustix::process::setsid();
        return Ok(Some(Started(true)));
    }
    let cannot = |err| Failure::new(format!("cannot start in the background: {err}"));
    let program = std::env::current_exe().map_err(cannot)?;
    let mut child = Command::new(program)
        // Whatever the program's file is called: under this name it takes the daemon's options.
        .arg0(super::PROGRAM)
        .args(arguments)
        .env(MARK, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(cannot)?;
    let mut word = [0];
    let told = child.stdout.take().map(|mut pipe| pipe.read(&mut word));
    match told {
        Some(Ok(1)) => Ok(None),
        _ => {
            let ended = child.wait().map_err(cannot)?;
            let code =
                ended.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(crate::failure::code::FAILED);
            Err(Failure::silent(code.max(1)))
        }
    }
}

/// True in the process that runs in the background.
pub(super) fn is_child() -> bool {
    std::env::var_os(MARK).is_some()
}

/// A file with the number of this process, locked, for as long as it runs.
pub(super) struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    /// Writes it. It appears whole: whoever waits for it may read it at once.
    ///
    /// # Errors
    /// If it can't be written, or belongs to another process that lives.
    pub(super) fn write(path: &str) -> Outcome<Self> {
        let cannot = |err| Failure::new(format!("cannot create PID file: {path}: {err}"));
        let taken = || {
            Failure::new(format!(
                "cannot create PID file: {path}: Cannot lock pid file: another daemon has it"
            ))
        };
        // One that a process left behind is replaced, while its lock is ours.
        let left = match File::options().write(true).open(path) {
            Ok(left) => Some(left),
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => None,
            Err(err) => return Err(cannot(err)),
        };
        if left.as_ref().is_some_and(|left| left.try_lock().is_err()) {
            return Err(taken());
        }
        let new = new_name(path);
        let mut file = File::options().create(true).truncate(false).write(true).open(&new).map_err(cannot)?;
        if file.try_lock().is_err() {
            return Err(taken());
        }
        file.set_len(0).map_err(cannot)?;
        file.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(cannot)?;
        let flags = if left.is_some() { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        match rustix::fs::renameat_with(CWD, &new, CWD, path, flags) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(taken()),
            // A file system that has no such rename.
            Err(rustix::io::Errno::INVAL) => std::fs::rename(&new, path).map_err(cannot)?,
            Err(err) => return Err(cannot(err.into())),
        }
        Ok(Self { path: std::path::absolute(Path::new(path)).map_err(cannot)?, _locked: file })
    }
}

/// What the file `path` is called until it is written.
pub(super) fn new_name(path: &str) -> String {
    format!("{path}.new")
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // If it is gone already, so much the better.
        let _ = std::fs::remove_file(&self.path);
    }
}
