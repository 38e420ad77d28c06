//! What is told of replicas: events as they happen, and counters.

use crate::error::Error;
use std::cell::Cell;

/// Something that happened to a replica.
#[derive(Debug, Clone)]
pub enum ReplicaEvent {
    /// It isn't used until it is well again.
    Left {
        /// Its name.
        name: String,
        /// Why.
        error: Error,
    },
    /// It is used again, or for the first time.
    Returned {
        /// Its name.
        name: String,
    },
    /// It is never used again.
    Distrusted {
        /// Its name.
        name: String,
        /// Why.
        error: Error,
    },
}

impl std::fmt::Display for ReplicaEvent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Left { name, error } => write!(f, "{name} is not used until it is well again: {error}"),
            Self::Returned { name } => write!(f, "{name} is used again"),
            Self::Distrusted { name, error } => write!(f, "{name} is not used any more: {error}"),
        }
    }
}

/// What is known of a replica.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplicaReport {
    /// Its name.
    pub name: String,
    /// "good", "left" or "distrusted".
    pub state: &'static str,
    /// Why it isn't good.
    pub error: Option<String>,
    /// Requests that it was sent, hedges among them.
    pub reads: u64,
    /// Bytes that it brought.
    pub bytes: u64,
    /// Requests that it failed.
    pub failures: u64,
    /// How often it was left.
    pub left: u64,
    /// In seconds, as measured of late.
    pub latency: f64,
    /// In bytes a second, as measured of late.
    pub rate: f64,
}

/// Counters over all replicas.
#[derive(Debug, Default)]
pub struct ReplicasCounters {
    /// Reads, each counted once.
    pub reads: Cell<u64>,
    /// Reads that were sent to a second replica because the first was slow.
    pub hedges: Cell<u64>,
    /// Hedges that were answered first.
    pub hedges_won: Cell<u64>,
    /// Requests that went on to another replica because one failed or stalled.
    pub failovers: Cell<u64>,
}
