//! Why a command is refused, in QMP's terms.

use crate::failure::Failure;
use headwater_block::{Error, ErrorKind};
pub(super) use headwater_qmp::QmpError as Refusal;

/// A refusal of the general class.
pub(super) fn generic(desc: impl Into<String>) -> Refusal {
    Refusal::generic(desc)
}

/// A job or a device that isn't there.
pub(super) fn no_device(desc: impl Into<String>) -> Refusal {
    Refusal::device_not_found(desc)
}

/// A failure of the data path.
pub(super) fn of_error(err: &Error) -> Refusal {
    generic(err.to_string())
}

/// A failure that people are told of.
pub(super) fn of_failure(failure: Failure) -> Refusal {
    generic(failure.message.unwrap_or_default())
}

/// A failure to open what people call `name`, in the words that scripts look for.
pub(super) fn cannot_open(name: &str, err: &Error) -> Refusal {
    match (err.os_code(), err.kind()) {
        (Some(code), _) => generic(format!("Could not open '{name}': {}", errno_text(code))),
        (None, ErrorKind::Unavailable) => generic(format!("Could not open '{name}': {err}")),
        _ => of_error(err),
    }
}

/// What the system calls an errno.
pub(super) fn errno_text(code: i32) -> String {
    let text = std::io::Error::from_raw_os_error(code).to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// How an error is called in events and in the results of jobs: the system's word for it, where it has one.
pub(super) fn brief(err: &Error) -> String {
    match (err.os_code(), err.kind()) {
        (Some(code), _) => errno_text(code),
        (None, ErrorKind::NoSpace) => errno_text(libc::ENOSPC),
        (None, ErrorKind::Io | ErrorKind::Unavailable | ErrorKind::TimedOut) => errno_text(libc::EIO),
        _ => err.to_string(),
    }
}
