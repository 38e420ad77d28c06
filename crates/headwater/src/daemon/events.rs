//! Events: what happens, told to every monitor in the order in which it happened.

use super::monitor::Outbox;
use headwater_qmp::message::{Event, Timestamp};
use serde_json::Value;
use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::time::{Duration, SystemTime};

/// Where events go: the monitors that are connected and have negotiated.
#[derive(Default)]
pub(super) struct Events {
    listeners: RefCell<Vec<Weak<Outbox>>>,
}

impl Events {
    /// Events go to `outbox` too, for as long as it lives.
    pub(super) fn listen(&self, outbox: &Rc<Outbox>) {
        let mut listeners = self.listeners.borrow_mut();
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(Rc::downgrade(outbox));
    }

    /// Nothing more will happen: what waits to be sent is sent, and then the connections end.
    pub(super) fn close(&self) {
        for listener in self.listeners.borrow().iter().filter_map(Weak::upgrade) {
            listener.close();
        }
    }

    /// Tells everyone.
    pub(super) fn emit(&self, name: &str, data: Value) {
        tracing::trace!(target: super::trace::TARGET, event = "monitor_protocol_event_emit", name, %data);
        let now = now();
        let timestamp = Timestamp {
            seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            microseconds: now.subsec_micros(),
        };
        let event = Event { timestamp, name: name.to_owned(), data: Some(data) };
        for listener in self.listeners.borrow().iter().filter_map(Weak::upgrade) {
            listener.push_event(&event);
        }
    }
}

/// The time since 1970.
#[allow(
    clippy::disallowed_methods,
    reason = "events carry the time of the day, which no decision depends on"
)]
pub(super) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}
