//! The rules by which faults are injected, and the state that they share. No I/O and no waiting.
//!
//! - An event looks at all rules for it whose state is the current one, or that ask for none. Those that inject an error become **armed**, in the
//!   place of those that were; if none does, what was armed stays so. Then the state changes, if a rule for the event says so (the first that does).
//! - A request fails by the first armed rule that fits it: its kind, and, if the rule has a sector, the sector's first byte. A rule without a kind fits all but questions
//!   for the status. Rules stay armed, unless they say `once`: then they are gone for good.
//! - A rule with errno 0 that fits lets the request pass, whatever others would say, and is never used up.

use crate::debug_event::DebugEvent;
use crate::error::{Error, ErrorKind, Result};
use std::ops::Range;
use std::str::FromStr;

/// The unit of [`InjectError::sector`] in bytes.
const SECTOR: u64 = 512;
/// The largest number that the kernel gives to an error.
const MAX_ERRNO: i32 = 4095;

/// The kind of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoType {
    /// Data are read.
    Read,
    /// Data are written.
    Write,
    /// Zeroes are written.
    WriteZeroes,
    /// A range is discarded.
    Discard,
    /// What was written is made durable.
    Flush,
    /// The status of a range is asked for.
    BlockStatus,
}

impl IoType {
    const ALL: [IoType; 6] = [
        IoType::Read,
        IoType::Write,
        IoType::WriteZeroes,
        IoType::Discard,
        IoType::Flush,
        IoType::BlockStatus,
    ];

    /// The name, as options give it.
    pub fn name(self) -> &'static str {
        match self {
            IoType::Read => "read",
            IoType::Write => "write",
            IoType::WriteZeroes => "write-zeroes",
            IoType::Discard => "discard",
            IoType::Flush => "flush",
            IoType::BlockStatus => "block-status",
        }
    }
}

impl FromStr for IoType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(IoType::name).join(", ");
            Error::new(ErrorKind::InvalidInput, format!("{name:?} is no iotype; there are {names}"))
        })
    }
}

/// A rule that makes a request fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InjectError {
    /// What arms it.
    pub event: DebugEvent,
    /// The state in which the event arms it; none: in all.
    pub state: Option<u32>,
    /// The kind of requests that it makes fail; none: all but [`IoType::BlockStatus`].
    pub iotype: Option<IoType>,
    /// What the operating system's number for the failure is.
    pub errno: i32,
    /// The sector, of 512 bytes, whose first byte the request must cover; none: any.
    pub sector: Option<u64>,
    /// It makes one request fail, and is then forgotten.
    pub once: bool,
    /// The request fails at once, before other requests get their turn.
    pub immediately: bool,
}

impl InjectError {
    /// EIO for every request after `event`.
    pub fn new(event: DebugEvent) -> Self {
        Self { event, state: None, iotype: None, errno: 5, sector: None, once: false, immediately: false }
    }

    pub(super) fn check(&self) -> Result<()> {
        if (0..=MAX_ERRNO).contains(&self.errno) {
            return Ok(());
        }
        let message = format!(
            "the rule for {} has errno {}, which is no error's number (1 to {MAX_ERRNO}, or 0 for a request that passes)",
            self.event.name(),
            self.errno
        );
        Err(Error::new(ErrorKind::InvalidInput, message))
    }

    fn fits(&self, range: &Range<u64>, kind: IoType) -> bool {
        let fits_kind = match self.iotype {
            Some(only) => only == kind,
            None => kind != IoType::BlockStatus,
        };
        fits_kind && self.sector.is_none_or(|sector| range.contains(&sector.saturating_mul(SECTOR)))
    }
}

/// A rule that changes the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetState {
    /// When.
    pub event: DebugEvent,
    /// The state in which it applies; none: in all.
    pub state: Option<u32>,
    /// The state that follows.
    pub new_state: u32,
}

/// True if a rule for `state` applies in the state `now`. 0 stands for all, as in QEMU's configuration files.
fn applies(state: Option<u32>, now: u32) -> bool {
    state.is_none_or(|state| state == 0 || state == now)
}

/// An error to be injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Injected {
    pub(super) errno: i32,
    pub(super) immediately: bool,
}

/// The rules, what is armed, and the state.
pub(super) struct Engine {
    /// Those that are left.
    inject: Vec<InjectError>,
    set_state: Vec<SetState>,
    /// Indices of `inject`.
    armed: Vec<usize>,
    state: u32,
}

impl Engine {
    pub(super) fn new(inject: Vec<InjectError>, set_state: Vec<SetState>) -> Self {
        let mut engine = Self { inject, set_state, armed: Vec::new(), state: 1 };
        engine.event(DebugEvent::None);
        engine
    }

    pub(super) fn event(&mut self, event: DebugEvent) {
        let state = self.state;
        let rules = self.inject.iter().enumerate();
        let arm =
            rules.filter(|(_, rule)| rule.event == event && applies(rule.state, state)).map(|(at, _)| at);
        let arm: Vec<usize> = arm.collect();
        if !arm.is_empty() {
            self.armed = arm;
        }
        let next = self.set_state.iter().find(|rule| rule.event == event && applies(rule.state, state));
        self.state = next.map_or(state, |rule| rule.new_state);
    }

    /// What becomes of a request: none if it passes.
    pub(super) fn judge(&mut self, range: &Range<u64>, kind: IoType) -> Option<Injected> {
        let at = self.armed.iter().copied().find(|at| self.inject[*at].fits(range, kind))?;
        let InjectError { errno, immediately, once, .. } = self.inject[at];
        if errno == 0 {
            return None;
        }
        if once {
            self.inject.remove(at);
            self.armed.retain(|other| *other != at);
            self.armed.iter_mut().filter(|other| **other > at).for_each(|other| *other -= 1);
        }
        Some(Injected { errno, immediately })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Range<u64> = 0..512;

    fn errno(engine: &mut Engine, kind: IoType) -> Option<i32> {
        engine.judge(&ANY, kind).map(|injected| injected.errno)
    }

    #[test]
    fn an_armed_rule_stays_so_until_others_take_its_place() {
        let rules = [(DebugEvent::ReadAio, 5), (DebugEvent::WriteAio, 28)];
        let rules = rules.map(|(event, errno)| InjectError { errno, ..InjectError::new(event) });
        let mut engine = Engine::new(rules.to_vec(), Vec::new());
        assert_eq!(errno(&mut engine, IoType::Read), None);
        engine.event(DebugEvent::ReadAio);
        assert_eq!(errno(&mut engine, IoType::Read), Some(5));
        assert_eq!(errno(&mut engine, IoType::Flush), Some(5));
        engine.event(DebugEvent::L2Load);
        assert_eq!(errno(&mut engine, IoType::Read), Some(5));
        engine.event(DebugEvent::WriteAio);
        assert_eq!(errno(&mut engine, IoType::Read), Some(28));
        assert_eq!(errno(&mut engine, IoType::BlockStatus), None, "only who asks for it gets it");
    }

    #[test]
    fn a_rule_that_says_once_is_gone_and_the_others_are_not() {
        let rule = |errno, once| InjectError { errno, once, ..InjectError::new(DebugEvent::None) };
        let mut engine = Engine::new(vec![rule(1, true), rule(2, true), rule(3, false)], Vec::new());
        let seen: Vec<_> = (0..4).map(|_| errno(&mut engine, IoType::Write)).collect();
        assert_eq!(seen, [Some(1), Some(2), Some(3), Some(3)]);
    }

    #[test]
    fn states_lead_from_one_to_the_next() {
        let rules = vec![InjectError { state: Some(2), ..InjectError::new(DebugEvent::WriteAio) }];
        let change =
            |state, new_state| SetState { event: DebugEvent::WriteAio, state: Some(state), new_state };
        let mut engine = Engine::new(rules, vec![change(1, 2), change(2, 3)]);
        engine.event(DebugEvent::WriteAio);
        assert_eq!(errno(&mut engine, IoType::Write), None, "the state changes after the event");
        engine.event(DebugEvent::WriteAio);
        assert_eq!(errno(&mut engine, IoType::Write), Some(5));
    }

    #[test]
    fn a_sector_is_hit_by_what_covers_its_first_byte() {
        let rule = InjectError { sector: Some(2), ..InjectError::new(DebugEvent::None) };
        let mut engine = Engine::new(vec![rule], Vec::new());
        for (range, hit) in [
            (0..1024, false),
            (0..1025, true),
            (1024..1025, true),
            (1025..1536, false),
            (1536..2048, false),
            (0..0, false),
        ] {
            assert_eq!(engine.judge(&range, IoType::Read).is_some(), hit, "{range:?}");
        }
    }

    #[test]
    fn kinds_and_numbers_are_checked() {
        for kind in IoType::ALL {
            assert_eq!(kind.name().parse::<IoType>().unwrap(), kind);
        }
        assert!("readx".parse::<IoType>().unwrap_err().to_string().contains("write-zeroes"));
        for (errno, ok) in [(-5, false), (0, true), (4095, true), (4096, false)] {
            assert_eq!(
                InjectError { errno, ..InjectError::new(DebugEvent::None) }.check().is_ok(),
                ok,
                "{errno}"
            );
        }
    }
}
