//! The options that all nodes have.

use super::open::{Built, Inherited, Options, Read};
use super::{Role, Settings, holds};
use crate::daemon::failure::{Refusal, generic};
use headwater_block::{DetectZeroes, DiskOptions, Patience};

/// The settings that `options` make, with what they leave open.
pub(super) fn settings(options: Options, above: Inherited) -> Settings {
    let cache = options.object("cache");
    let of_cache = |key, default| cache.and_then(|cache| cache.flag(key)).unwrap_or(default);
    Settings {
        read_only: options.flag("read-only").unwrap_or(above.read_only),
        auto_read_only: options.flag("auto-read-only").unwrap_or(above.auto_read_only),
        direct: of_cache("direct", above.direct),
        no_flush: of_cache("no-flush", above.no_flush),
        force_share: options.flag("force-share").unwrap_or(above.force_share),
        inactive: options.flag("active") == Some(false),
        options,
    }
}

/// How the disk of a node behaves.
pub(super) fn disk_options(
    settings: &Settings,
    built: &Built,
    above: Inherited,
) -> Result<DiskOptions, Refusal> {
    let unmap = unmaps(&settings.options, above.unmap);
    let detect_zeroes = detect_zeroes(&settings.options, unmap)?;
    holds::own(&settings.options)?;
    if settings.force_share && !settings.read_only {
        return Err(generic("force-share=on can only be used with read-only images"));
    }
    let filter = built.links.iter().any(|link| link.role == Role::Filtered);
    Ok(DiskOptions {
        detect_zeroes,
        read_only: settings.read_only || settings.inactive,
        growable: built.growable
            || (filter && built.links.iter().all(|link| link.to.disk.options().growable)),
        ignore_discards: !unmap && !filter,
        copy_on_read: false,
        patience: Patience::None,
    })
}

/// True if discards are passed on: if `options` say so, or if they say nothing and `inherited` does.
pub(super) fn unmaps(options: &Options, inherited: bool) -> bool {
    options.text("discard").map_or(inherited, |discard| discard == "unmap")
}

/// What becomes of zeroes that are written.
///
/// # Errors
/// If they are to be discarded where discards aren't passed on.
pub(super) fn detect_zeroes(options: &Options, unmap: bool) -> Result<DetectZeroes, Refusal> {
    match options.text("detect-zeroes") {
        Some("on") => Ok(DetectZeroes::On),
        Some("unmap") if unmap => Ok(DetectZeroes::Unmap),
        Some("unmap") => Err(generic(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        )),
        _ => Ok(DetectZeroes::Off),
    }
}
