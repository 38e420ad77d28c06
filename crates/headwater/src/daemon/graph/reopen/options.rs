//! What a definition of a node may say when the node is opened again.

use crate::daemon::failure::{Refusal, generic};
use crate::daemon::graph::holds;
use crate::daemon::graph::open::{Options, Read};
use serde_json::Value;
use std::collections::BTreeMap;

/// What is looked at by itself: it may be new, or is compared otherwise than as an option.
pub(super) const CHANGEABLE: [&str; 10] = [
    "driver",
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "cache.direct",
    "cache.no-flush",
    "force-share",
    holds::OPTION,
];

/// What each driver can change while it is open, beside what all can.
fn changeable(driver: &str) -> &'static [&'static str] {
    match driver {
        "raw" => &["offset", "size"],
        "file" | "host_device" => &["x-check-cache-dropped"],
        "throttle" => &["throttle-group"],
        "qcow2" => &[
            "lazy-refcounts",
            "pass-discard-request",
            "pass-discard-snapshot",
            "pass-discard-other",
            "discard-no-unref",
            "overlap-check",
            "cache-size",
            "l2-cache-size",
            "l2-cache-entry-size",
            "refcount-cache-size",
            "cache-clean-interval",
        ],
        _ => &[],
    }
}

/// True for an option that has its default again where a definition leaves it out.
pub(super) fn is_reset_freely(driver: &str, key: &str) -> bool {
    let same = |known: &&str| {
        let nested = key.strip_prefix(*known).is_some_and(|rest| rest.starts_with('.'));
        key == *known || nested
    };
    CHANGEABLE.iter().any(&same) || changeable(driver).iter().any(same)
}

/// The options that are about children.
pub(super) fn child_keys(driver: &str) -> &'static [&'static str] {
    match driver {
        "raw" | "throttle" | "copy-on-read" | "compress" | "verify" => &["file"],
        "qcow2" => &["backing", "file", "data-file"],
        "blkdebug" => &["image"],
        "blkverify" => &["test", "raw"],
        "replicas" => &["children"],
        _ => &[],
    }
}

/// The options of a node by their full names ("server.path"), without those that are about its children.
pub(super) fn flat(driver: &str, options: &Options) -> BTreeMap<String, Value> {
    fn add(to: &mut BTreeMap<String, Value>, name: String, value: &Value) {
        match value {
            Value::Object(fields) => {
                fields.iter().for_each(|(key, value)| add(to, format!("{name}.{key}"), value))
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(at, value)| add(to, format!("{name}.{at}"), value));
            }
            value => {
                to.insert(name, value.clone());
            }
        }
    }
    let mut all = BTreeMap::new();
    for (key, value) in options.iter().filter(|(key, _)| !child_keys(driver).contains(&key.as_str())) {
        add(&mut all, key.clone(), value);
    }
    all
}

/// Refuses sizes of a qcow2 image's caches that can't be.
///
/// # Errors
/// Says which, and what would be right.
pub(super) fn check_caches(options: &Options, cluster_size: u64) -> Result<(), Refusal> {
    if let Some(size) = options.number("l2-cache-entry-size")
        && !(size.is_power_of_two() && (512..=cluster_size).contains(&size))
    {
        return Err(generic(format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster_size})"
        )));
    }
    let whole = options.number("cache-size");
    for part in ["l2-cache-size", "refcount-cache-size"] {
        if options.number(part).zip(whole).is_some_and(|(part, whole)| part > whole) {
            return Err(generic(format!("{part} may not exceed cache-size")));
        }
    }
    Ok(())
}
