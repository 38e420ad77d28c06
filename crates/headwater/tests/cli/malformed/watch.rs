//! What is opened while nobody should: inotify for files, listeners for addresses.

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

/// Sees every opening of a file in some directories.
pub(super) struct Watch {
    queue: OwnedFd,
    /// What is watched, by the number of its watch.
    watched: Vec<(i32, String)>,
}

impl Watch {
    pub(super) fn new(paths: &[&str]) -> Self {
        let queue = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).expect("inotify");
        let add = |path: &&str| {
            let number = inotify::add_watch(&queue, *path, WatchFlags::OPEN).expect("watch");
            (number, (*path).to_owned())
        };
        let watched = paths.iter().map(add).collect();
        Self { queue, watched }
    }

    /// The paths that were opened since it was asked last.
    pub(super) fn opened(&self) -> BTreeSet<String> {
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut reader = inotify::Reader::new(&self.queue, &mut buffer);
        let mut opened = BTreeSet::new();
        while let Ok(event) = reader.next() {
            assert!(!event.events().contains(ReadFlags::QUEUE_OVERFLOW), "more was opened than can be told");
            let (_, path) = self.watched.iter().find(|(number, _)| *number == event.wd()).expect("a watch");
            let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
            // A directory that is itself opened, to make a file durable or to look into it, is no file in it.
            if let Some(name) =
                name.or_else(|| (!event.events().contains(ReadFlags::ISDIR)).then(String::new))
            {
                opened.insert(format!("{path}/{name}").trim_end_matches('/').to_owned());
            }
        }
        opened
    }
}

/// Addresses that nobody should connect to.
pub(super) struct Listeners {
    tcp: TcpListener,
    unix: UnixListener,
}

impl Listeners {
    pub(super) fn new(socket: &str) -> Self {
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
        let unix = UnixListener::bind(socket).expect("bind");
        tcp.set_nonblocking(true).expect("nonblocking");
        unix.set_nonblocking(true).expect("nonblocking");
        Self { tcp, unix }
    }

    pub(super) fn port(&self) -> u16 {
        self.tcp.local_addr().expect("address").port()
    }

    /// Somebody has connected.
    pub(super) fn met(&self) -> bool {
        self.tcp.accept().is_ok() || self.unix.accept().is_ok()
    }
}
