//! What a server counts.

use std::cell::Cell;
use std::rc::Rc;

/// Counters of a server since it was started.
#[derive(Debug, Default)]
pub struct ServerStats {
    /// Clients connected right now.
    pub clients: Cell<u64>,
    /// Clients that ever connected.
    pub clients_total: Cell<u64>,
    /// Requests answered, failures included.
    pub requests: Cell<u64>,
    /// Requests answered with an error.
    pub failures: Cell<u64>,
    /// Bytes read by clients.
    pub read_bytes: Cell<u64>,
    /// Bytes written by clients; zeroes and trims not counted.
    pub written_bytes: Cell<u64>,
}

fn add(counter: &Cell<u64>, count: u64) {
    counter.set(counter.get().wrapping_add(count));
}

impl ServerStats {
    pub(crate) fn count_read(&self, bytes: u64) {
        add(&self.requests, 1);
        add(&self.read_bytes, bytes);
    }

    pub(crate) fn count_write(&self, bytes: u64) {
        add(&self.requests, 1);
        add(&self.written_bytes, bytes);
    }

    pub(crate) fn count_other(&self) {
        add(&self.requests, 1);
    }

    pub(crate) fn count_failure(&self) {
        add(&self.requests, 1);
        add(&self.failures, 1);
    }
}

/// Counts a client for as long as it lives.
pub(crate) struct Counted(pub(crate) Rc<ServerStats>);

impl Counted {
    pub(crate) fn new(stats: Rc<ServerStats>) -> Self {
        add(&stats.clients, 1);
        add(&stats.clients_total, 1);
        Self(stats)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.clients.set(self.0.clients.get().saturating_sub(1));
    }
}
