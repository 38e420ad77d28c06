//! What a throttle group is limited to, and which combinations make sense.

use crate::error::{Error, ErrorKind, Result};

/// The largest rate, and the largest burst, in bytes or requests (per second).
const MAX: u64 = 1_000_000_000_000_000;

/// A limit of one kind, in bytes or requests per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limit {
    /// What is allowed in the long run; 0 is without limit.
    pub rate: u64,
    /// What is allowed for a short time after a pause; 0 is no burst, beyond what [`Limit::rate`] allows in 100 ms.
    pub max: u64,
    /// For how many seconds it may go on at `max`; 1 if it isn't given.
    pub max_length: Option<u64>,
}

impl Limit {
    /// A limit without bursts.
    pub fn rate(rate: u64) -> Self {
        Self { rate, ..Self::default() }
    }

    pub(super) fn length(&self) -> u64 {
        self.max_length.unwrap_or(1)
    }

    fn check(&self, name: &str) -> Result<()> {
        let refuse = |what: String| Err(Error::new(ErrorKind::InvalidInput, what));
        let Self { rate, max, .. } = *self;
        if rate > MAX || max > MAX {
            let (which, value) = if rate > MAX { ("", rate) } else { ("-max", max) };
            return refuse(format!(
                "{name}{which} is {value}; bps, iops and max values must be within [0, {MAX}]"
            ));
        }
        if self.max_length == Some(0) {
            return refuse(format!(
                "{name}-max-length is 0, but the burst length cannot be 0; leave it out for one second"
            ));
        }
        if self.length() > 1 && max == 0 {
            return refuse(format!(
                "{name}-max-length is set without {name}-max: a burst length needs a burst rate to go with it"
            ));
        }
        if max > 0 && rate == 0 {
            return refuse(format!(
                "{name}-max is set without {name}: a burst needs the limit that it may exceed"
            ));
        }
        if max > 0 && max < rate {
            return refuse(format!("{name}-max ({max}) cannot be lower than {name} ({rate})"));
        }
        if max.checked_mul(self.length()).is_none_or(|all| all > MAX) {
            return refuse(format!(
                "{name}-max-length ({}) is too high for this burst rate ({max}): {name}-max times {name}-max-length may be {MAX} at most",
                self.length()
            ));
        }
        Ok(())
    }
}

/// Limits of one kind for all requests together, or for reads and for writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Directions {
    /// For all requests together. Excludes the other two.
    pub total: Limit,
    /// For reads.
    pub read: Limit,
    /// For writes, zero-writes and discards.
    pub write: Limit,
}

impl Directions {
    fn check(&self, kind: &str) -> Result<()> {
        let Self { total, read, write } = self;
        for (suffix, of) in [("", (|limit| limit.rate) as fn(&Limit) -> u64), ("-max", |limit| limit.max)] {
            let one = [("read", read), ("write", write)].into_iter().find(|(_, limit)| of(limit) > 0);
            if let (true, Some((direction, _))) = (of(total) > 0, one) {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!(
                        "{kind}-total{suffix} and {kind}-{direction}{suffix} cannot be used at the same time: limit both directions together, \
                         or each by itself"
                    ),
                ));
            }
        }
        for (direction, limit) in [("total", total), ("read", read), ("write", write)] {
            limit.check(&format!("{kind}-{direction}"))?;
        }
        Ok(())
    }

    fn is_limited(&self) -> bool {
        [self.total, self.read, self.write].iter().any(|limit| limit.rate > 0)
    }
}

/// All that a group is limited to. The default is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// Bytes per second.
    pub bps: Directions,
    /// Requests per second.
    pub iops: Directions,
    /// A request longer than this, in bytes, counts as several, in proportion; 0: each request counts as one.
    pub iops_size: u64,
}

impl ThrottleLimits {
    /// Refuses what makes no sense. Messages name the options as QEMU's ThrottleLimits does.
    ///
    /// # Errors
    /// `InvalidInput`.
    pub fn check(&self) -> Result<()> {
        self.bps.check("bps")?;
        self.iops.check("iops")?;
        if self.iops_size > 0 && !self.iops.is_limited() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "iops-size is set, but no iops limit: it requires an iops value to be set".to_owned(),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(rate: u64, max: u64, max_length: Option<u64>) -> Limit {
        Limit { rate, max, max_length }
    }

    /// Settings, as a change of the default, what QEMU's options for them are, and what its refusal and ours have in common ("" if both take it).
    type Case = (fn(&mut ThrottleLimits), &'static str, &'static str);

    const CASES: &[Case] = &[
        (|_| (), "", ""),
        (|l| l.bps.total = limit(100, 0, None), "x-bps-total=100", ""),
        (
            |l| l.bps.total = limit(MAX, MAX, None),
            "x-bps-total=1000000000000000,x-bps-total-max=1000000000000000",
            "",
        ),
        (
            |l| l.bps.total = limit(MAX + 1, 0, None),
            "x-bps-total=1000000000000001",
            "must be within [0, 1000000000000000]",
        ),
        (
            |l| (l.bps.total, l.bps.read) = (limit(100, 0, None), limit(5, 0, None)),
            "x-bps-total=100,x-bps-read=5",
            "cannot be used at the same time",
        ),
        (
            |l| (l.iops.read, l.iops.total) = (limit(100, 200, None), limit(0, 300, None)),
            "x-iops-read=100,x-iops-read-max=200,x-iops-total-max=300",
            "cannot be used at the same time",
        ),
        (
            |l| (l.bps.total, l.iops.read) = (limit(100, 0, None), limit(5, 0, None)),
            "x-bps-total=100,x-iops-read=5",
            "",
        ),
        (
            |l| l.bps.write = limit(100, 50, None),
            "x-bps-write=100,x-bps-write-max=50",
            "cannot be lower than",
        ),
        (|l| l.iops.total = limit(0, 50, None), "x-iops-total-max=50", "max"),
        (
            |l| l.iops.total = limit(10, 0, Some(5)),
            "x-iops-total=10,x-iops-total-max-length=5",
            "burst length",
        ),
        (|l| l.iops.total = limit(10, 0, Some(1)), "x-iops-total=10,x-iops-total-max-length=1", ""),
        (
            |l| l.iops.total = limit(10, 20, Some(0)),
            "x-iops-total=10,x-iops-total-max=20,x-iops-total-max-length=0",
            "the burst length cannot be 0",
        ),
        (
            |l| l.iops.total = limit(10, MAX / 10, Some(11)),
            "x-iops-total=10,x-iops-total-max=100000000000000,x-iops-total-max-length=11",
            "too high for this burst rate",
        ),
        (|l| l.iops_size = 512, "x-iops-size=512", "requires an iops value to be set"),
        (|l| (l.iops_size, l.iops.write.rate) = (512, 1), "x-iops-size=512,x-iops-write=1", ""),
        (
            |l| (l.iops_size, l.bps.write.rate) = (512, 1),
            "x-iops-size=512,x-bps-write=1",
            "requires an iops value to be set",
        ),
    ];

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (change, options, part) in CASES {
            let mut limits = ThrottleLimits::default();
            change(&mut limits);
            match limits.check() {
                Ok(()) => assert_eq!(*part, "", "{options}"),
                Err(err) => {
                    assert_eq!(err.kind(), ErrorKind::InvalidInput);
                    assert!(!part.is_empty() && err.to_string().contains(part), "{options}: {err}");
                }
            }
        }
    }

    #[test]
    fn qemu_refuses_the_same() {
        for (_, options, part) in CASES {
            let group = format!("throttle-group,id=t{}{options}", if options.is_empty() { "" } else { "," });
            // The second object ends it in any case.
            let run = std::process::Command::new("qemu-storage-daemon")
                .args(["--object", &group, "--object", "none-such,id=x"])
                .output();
            let Ok(output) = run else {
                assert!(
                    std::env::var_os("HEADWATER_REQUIRE_TOOLS").is_none(),
                    "qemu-storage-daemon is not installed"
                );
                return;
            };
            let text = String::from_utf8_lossy(&output.stderr);
            let part = if part.is_empty() { "none-such" } else { part };
            assert!(text.contains(part), "{options}: {text}");
        }
    }
}
