//! Descriptors that this process was started with: by number, or as sockets that a service manager listens on (systemd's socket activation).

use crate::failure::{Failure, Outcome};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use std::io;
use std::os::fd::{OwnedFd, RawFd};

/// The first descriptor that a service manager hands over.
const FIRST: RawFd = 3;

/// What a socket is called that has no name of its own.
const NAMELESS: &str = "unknown";

/// A copy of a descriptor: who gave it to this process may use it for something else as well.
///
/// # Errors
/// If there is none of that number.
pub fn descriptor(number: RawFd) -> io::Result<OwnedFd> {
    let process = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(process, number, PidfdGetfdFlags::empty())?)
}

/// The socket of that name which a service manager listens on for us; without a name, the only one.
///
/// # Errors
/// If there is none, or several fit.
pub fn listening(name: Option<&str>) -> Outcome<OwnedFd> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let pid = getpid().as_raw_nonzero().to_string();
    let number =
        find(&pid, &variable("LISTEN_PID"), &variable("LISTEN_FDS"), &variable("LISTEN_FDNAMES"), name)
            .map_err(Failure::new)?;
    descriptor(number)
        .map_err(|err| Failure::new(format!("the socket that was handed over ({number}): {err}")))
}

/// The number of the descriptor, from what the environment says.
fn find(pid: &str, listen_pid: &str, count: &str, names: &str, name: Option<&str>) -> Result<RawFd, String> {
    if listen_pid != pid {
        return Err("no socket was handed over: start it with a socket unit of systemd, or with systemd-socket-activate".into());
    }
    let count: usize = count.parse().map_err(|_| format!("LISTEN_FDS is '{count}', not a number"))?;
    let mut names = names.split(':').filter(|name| !name.is_empty());
    let called: Vec<&str> = (0..count).map(|_| names.next().unwrap_or(NAMELESS)).collect();
    let fitting: Vec<usize> = (0..count).filter(|at| name.is_none_or(|name| called[*at] == name)).collect();
    match (&fitting[..], name) {
        ([at], _) => Ok(FIRST + RawFd::try_from(*at).map_err(|_| "LISTEN_FDS is too large".to_owned())?),
        ([], Some(name)) => Err(format!("no socket '{name}' was handed over, but: {}", called.join(", "))),
        ([], None) => Err("no socket was handed over: LISTEN_FDS is 0".into()),
        _ => Err(format!(
            "several sockets fit ({}): name one with ?socket=NAME (FileDescriptorName= of its unit)",
            called.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_by_name_or_alone() {
        let find = |count, names, name| find("7", "7", count, names, name);
        assert_eq!(find("1", "", None), Ok(3));
        assert_eq!(find("1", "nbd.socket", None), Ok(3));
        assert_eq!(find("2", "a:b", Some("b")), Ok(4));
        assert_eq!(find("2", "a", Some("unknown")), Ok(4));
        assert!(find("2", "a:b", None).unwrap_err().contains("several"));
        assert!(find("2", "a:a", Some("a")).unwrap_err().contains("several"));
        assert!(find("2", "a:b", Some("c")).unwrap_err().contains("a, b"));
        assert!(find("0", "", None).is_err() && find("x", "", None).is_err());
    }

    #[test]
    fn what_was_meant_for_another_process_is_left_alone() {
        assert!(super::find("7", "8", "1", "", None).is_err());
        assert!(super::find("7", "", "", "", None).is_err());
    }
}
