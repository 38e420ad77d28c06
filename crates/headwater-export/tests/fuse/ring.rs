//! Whether requests can come over io_uring here.

use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;

const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// How requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Ring,
    File,
}

impl Way {
    /// Those that there are on this machine.
    pub(crate) fn all() -> Vec<Self> {
        let lacking = match (io_uring::IoUring::new(1), parameter()) {
            (Err(error), _) => format!("there is no io_uring here: {error}"),
            (_, None) => format!("the kernel has no {PARAMETER} (Linux 6.14)"),
            (_, Some((false, None))) => format!("{PARAMETER} is off, and only root can switch it on"),
            (Ok(_), Some(_)) => return vec![Self::Ring, Self::File],
        };
        eprintln!("NOT TESTED: FUSE over io_uring; {lacking}");
        vec![Self::File]
    }
}

/// Whether it is on; and the parameter, if we may set it.
fn parameter() -> Option<(bool, Option<File>)> {
    let mut text = String::new();
    File::open(PARAMETER).ok()?.read_to_string(&mut text).ok()?;
    Some((text.trim() == "Y", OpenOptions::new().write(true).open(PARAMETER).ok()))
}

/// Does what makes the first exchange with the kernel, while that offers io_uring. What was agreed upon stays so when the parameter is as it was.
pub(crate) async fn with_ring<T>(wanted: bool, work: impl Future<Output = T>) -> T {
    if !wanted {
        return work.await;
    }
    let switched = Switched::to(true).expect("one of the ways of this machine");
    let done = work.await;
    drop(switched);
    done
}

/// Does what makes the first exchange with the kernel, while that doesn't offer io_uring: `None` where it can't be kept from that.
pub(crate) async fn without_ring<T>(work: impl Future<Output = T>) -> Option<T> {
    let switched = match parameter() {
        Some(_) => Some(Switched::to(false)?),
        None => None,
    };
    let done = work.await;
    drop(switched);
    Some(done)
}

/// The parameter as a test wants it, which puts it back.
struct Switched {
    /// Tests that run at once take turns.
    _turn: File,
    back: Option<(File, &'static [u8])>,
}

impl Switched {
    /// `None` if it isn't so, and we may not set it.
    fn to(wanted: bool) -> Option<Self> {
        let turn = File::open(PARAMETER).unwrap();
        flock(&turn, FlockOperation::LockExclusive).unwrap();
        let (on, file) = parameter()?;
        if on == wanted {
            return Some(Self { _turn: turn, back: None });
        }
        let file = file?;
        let word = |on| if on { &b"Y"[..] } else { b"N" };
        file.write_all_at(word(wanted), 0).unwrap();
        Some(Self { _turn: turn, back: Some((file, word(on))) })
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        if let Some((file, word)) = &self.back {
            file.write_all_at(word, 0).unwrap();
        }
    }
}
