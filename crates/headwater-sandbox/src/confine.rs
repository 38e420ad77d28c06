//! What a process that works alone gives up: it writes only where it was told to, and runs no programs.
//!
//! That is less than a [data plane](crate::DataPlane) gives up, which has somebody to ask: such a process may read what its user may, and
//! connect anywhere. But whoever takes it over by a hostile image or server stays for as long as it does.

use crate::profile;
use crate::split::Unavailable;
use landlock::{
    ABI, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use std::path::PathBuf;

/// From here on this thread, and those that it starts, change files only in the directories `below`, each with what is below it, and the
/// files `only`, and what is open already; execute nothing, and signal and trace nobody outside. Directories and files that aren't there add nothing. The
/// parts that the kernel can't have are left out.
///
/// # Errors
/// If none of it can be had: no Landlock, or no seccomp.
pub fn confine(below: &[PathBuf], only: &[PathBuf]) -> Result<(), Unavailable> {
    // The newest that is about changing files alone: later ones judge what a command needs (ioctls of devices, connections).
    let changes = AccessFs::from_write(ABI::V3);
    let of_files = AccessFs::WriteFile | AccessFs::Truncate;
    let rules = below.iter().map(|path| (path, changes)).chain(only.iter().map(|path| (path, of_files)));
    let rules = rules
        .filter_map(|(path, access)| Some(PathBeneath::new(PathFd::new(path).ok()?, access)))
        .map(Ok::<_, landlock::RulesetError>);
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(changes | AccessFs::Execute)
        .and_then(|ruleset| ruleset.scope(Scope::Signal))
        .and_then(|ruleset| ruleset.create())
        .and_then(|ruleset| ruleset.add_rules(rules))
        .and_then(|ruleset| ruleset.restrict_self())
        .map_err(|err| Unavailable::new("cannot restrict this process with Landlock", err))?;
    if restricted.ruleset == RulesetStatus::NotEnforced {
        return Err(Unavailable::new("Landlock", "the kernel has none, or it is switched off"));
    }
    let cannot = |err: &dyn std::fmt::Display| Unavailable::new("cannot install a seccomp filter", err);
    let program = profile::alone().map_err(|err| cannot(&err))?;
    seccompiler::apply_filter(&program).map_err(|err| cannot(&err))
}
