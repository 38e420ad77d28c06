//! Standard input and output as sockets. They may be anything, files too, so threads of their own read and write them.

use std::io::{Read, Write};
use std::thread::JoinHandle;
use tokio::net::UnixStream;

/// What comes from standard input. The thread that reads it may be reading when the program ends.
pub(in crate::daemon) fn input() -> std::io::Result<UnixStream> {
    let (ours, mut to_us) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    std::thread::spawn(move || {
        // Whatever ends it, the monitor sees the end of its input.
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut to_us);
    });
    UnixStream::from_std(ours)
}

/// What goes to standard output, and the thread that ends when all of it has.
pub(in crate::daemon) fn output() -> std::io::Result<(UnixStream, JoinHandle<()>)> {
    let (ours, mut from_us) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let writer = std::thread::spawn(move || {
        let mut bytes = [0; 16 << 10];
        while let Ok(read @ 1..) = from_us.read(&mut bytes) {
            let mut output = std::io::stdout().lock();
            if output.write_all(&bytes[..read]).and_then(|()| output.flush()).is_err() {
                break;
            }
        }
    });
    Ok((UnixStream::from_std(ours)?, writer))
}
