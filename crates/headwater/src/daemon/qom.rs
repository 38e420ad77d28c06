//! Types of objects and their properties, as `qom-list-types` and `qom-list-properties` tell them.

use super::failure::Refusal;
use super::graph::open::{Options, Read};
use serde_json::{Value, json};

/// A type: its name, its parent's, and its properties with their types.
type Type = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

/// What can be made.
const TYPES: [Type; 5] = [
    (
        "throttle-group",
        "object",
        &[
            ("limits", "ThrottleLimits"),
            ("x-iops-total", "int"),
            ("x-iops-total-max", "int"),
            ("x-iops-total-max-length", "int"),
            ("x-iops-read", "int"),
            ("x-iops-read-max", "int"),
            ("x-iops-read-max-length", "int"),
            ("x-iops-write", "int"),
            ("x-iops-write-max", "int"),
            ("x-iops-write-max-length", "int"),
            ("x-bps-total", "int"),
            ("x-bps-total-max", "int"),
            ("x-bps-total-max-length", "int"),
            ("x-bps-read", "int"),
            ("x-bps-read-max", "int"),
            ("x-bps-read-max-length", "int"),
            ("x-bps-write", "int"),
            ("x-bps-write-max", "int"),
            ("x-bps-write-max-length", "int"),
            ("x-iops-size", "int"),
        ],
    ),
    (
        "secret",
        "secret_common",
        &[
            ("data", "string"),
            ("file", "string"),
            ("format", "QCryptoSecretFormat"),
            ("keyid", "string"),
            ("iv", "string"),
        ],
    ),
    (
        "iothread",
        "event-loop-base",
        &[
            ("poll-max-ns", "int"),
            ("poll-grow", "int"),
            ("poll-shrink", "int"),
            ("aio-max-batch", "int"),
            ("thread-pool-min", "int"),
            ("thread-pool-max", "int"),
        ],
    ),
    (
        "tls-creds-x509",
        "tls-creds",
        &[
            ("dir", "string"),
            ("endpoint", "QCryptoTLSCredsEndpoint"),
            ("verify-peer", "bool"),
            ("priority", "string"),
            ("sanity-check", "bool"),
            ("passwordid", "string"),
        ],
    ),
    (
        "tls-creds-psk",
        "tls-creds",
        &[
            ("dir", "string"),
            ("endpoint", "QCryptoTLSCredsEndpoint"),
            ("verify-peer", "bool"),
            ("priority", "string"),
            ("username", "string"),
        ],
    ),
];

/// `qom-list-types`: all of them, or those that are of the kind that is asked for.
pub(super) fn types(args: &Options) -> Value {
    let wanted = args.text("implements");
    let is = |(name, parent, _): &&Type| {
        wanted.is_none_or(|kind| {
            matches!(kind, "object" | "user-creatable") || kind == *name || kind == *parent
        })
    };
    TYPES.iter().filter(is).map(|(name, parent, _)| json!({"name": name, "parent": parent})).collect()
}

/// The properties of a type, its own name first; none if it isn't known.
pub(super) fn of_type(name: &str) -> Option<Value> {
    let (.., own) = TYPES.iter().find(|(known, ..)| *known == name)?;
    let all = std::iter::once(&("type", "string")).chain(own.iter());
    Some(all.map(|(name, kind)| json!({"name": name, "type": kind})).collect())
}

/// `qom-list-properties`.
///
/// # Errors
/// If there is no such type.
pub(super) fn properties(name: &str) -> Result<Value, Refusal> {
    of_type(name).ok_or_else(|| Refusal::device_not_found(format!("Class '{name}' not found")))
}
