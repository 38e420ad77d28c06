//! One error type for the whole data path: a small kind to match on, and a message for people.

use std::fmt;
use std::sync::Arc;

/// `Result` with headwater's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as far as a caller may want to act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The object does not exist.
    NotFound,
    /// It exists already and must not.
    AlreadyExists,
    /// The operating system or the other side refuses access.
    PermissionDenied,
    /// Another process uses the image, or a job needs it as it is.
    InUse,
    /// No room is left where data must be written (ENOSPC, EDQUOT, EFBIG).
    NoSpace,
    /// The medium or the other side failed this request.
    Io,
    /// The source cannot be reached, or closed the connection: worth trying again.
    Unavailable,
    /// Nothing came within the time allowed: worth trying again.
    TimedOut,
    /// The caller asked for something malformed.
    InvalidInput,
    /// The range lies outside the disk.
    OutOfRange,
    /// An image or a message breaks its format's rules.
    Corrupt,
    /// Well-formed, but not supported here.
    Unsupported,
    /// A name found inside an image that the operator did not allow.
    NotAllowed,
    /// A write to something that is open for reading only.
    ReadOnly,
    /// The source is no longer the one that was opened.
    SourceChanged,
    /// The bytes are not those that a manifest promises, or not those of the other replicas of an image. Asking again is of no use.
    WrongContent,
    /// The operation was cancelled before it had any effect.
    Cancelled,
    /// The object was shut down.
    Closed,
}

impl ErrorKind {
    /// True if the same request may succeed later, with nobody doing anything about it here.
    pub fn may_pass(self) -> bool {
        matches!(self, ErrorKind::Unavailable | ErrorKind::TimedOut)
    }
}

/// An error of the data path. Cheap to clone, because several waiters may share one failure.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind`. The message names the object, the offset, what was expected and what to do.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), source: None }))
    }

    /// An operating-system error; `what` says what was being done to which object ("read 512 bytes at 4096 of disk.raw").
    pub fn from_io(err: std::io::Error, what: impl fmt::Display) -> Self {
        use std::io::ErrorKind as K;
        let kind = match err.kind() {
            K::NotFound => ErrorKind::NotFound,
            K::AlreadyExists => ErrorKind::AlreadyExists,
            K::PermissionDenied => ErrorKind::PermissionDenied,
            K::StorageFull | K::QuotaExceeded | K::FileTooLarge => ErrorKind::NoSpace,
            K::TimedOut => ErrorKind::TimedOut,
            K::ConnectionRefused
            | K::ConnectionReset
            | K::ConnectionAborted
            | K::NotConnected
            | K::BrokenPipe
            | K::UnexpectedEof
            | K::HostUnreachable
            | K::NetworkUnreachable => ErrorKind::Unavailable,
            K::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            K::InvalidInput => ErrorKind::InvalidInput,
            K::Unsupported => ErrorKind::Unsupported,
            _ => ErrorKind::Io,
        };
        let message = format!("cannot {what}: {err}");
        Self(Arc::new(Inner { kind, message, source: Some(Arc::new(err)) }))
    }

    /// The same error with `context` put before its message ("disk.qcow2: ...").
    pub fn context(self, context: impl fmt::Display) -> Self {
        let inner = &*self.0;
        Self(Arc::new(Inner { message: format!("{context}: {}", inner.message), ..inner.clone() }))
    }

    /// The operating system's number for the failure (errno), if it came from there: for those who must hand it on to a guest.
    pub fn os_code(&self) -> Option<i32> {
        let err = self.0.source.as_ref()?.downcast_ref::<std::io::Error>()?;
        err.raw_os_error()
    }

    /// What went wrong, to match on.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.0.kind, self.0.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|s| &**s as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_number_survives_a_context() {
        let err = Error::from_io(std::io::Error::from_raw_os_error(28), "write").context("disk");
        assert_eq!((err.kind(), err.os_code()), (ErrorKind::NoSpace, Some(28)));
        assert_eq!(Error::new(ErrorKind::Io, "elsewhere").os_code(), None);
    }
}
