//! What a check found.

/// How many messages a report keeps; the rest is only counted, so that a thoroughly broken image can't fill memory.
const MAX_MESSAGES: usize = 200;

/// What a check may change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Reference counts that are too high: gives leaked space back, risks nothing.
    Leaks,
    /// Everything that can be repaired.
    All,
}

/// How serious a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Space that nothing refers to any more: wasted, harmless.
    Leak,
    /// The image breaks the format's rules: data are lost already or in danger.
    Corruption,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How serious it is.
    pub severity: Severity,
    /// What is wrong where; without the image's name.
    pub message: String,
}

/// The result of a check. Numbers of leaks and corruptions are those that remain after the repair.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Rules that the image breaks.
    pub corruptions: u64,
    /// Clusters whose reference count is higher than the number of references.
    pub leaks: u64,
    /// Corruptions that the repair removed.
    pub corruptions_fixed: u64,
    /// Leaks that the repair removed.
    pub leaks_fixed: u64,
    /// What was found before the repair, in order; at most a few hundred.
    pub findings: Vec<Finding>,
    /// How many findings are not in `findings`.
    pub omitted: u64,
    /// Where the last cluster in use ends, in bytes of the file.
    pub image_end: u64,
    /// The clusters of the guest's disk.
    pub total_clusters: u64,
    /// Those of them that have data in this image, compressed ones included.
    pub allocated_clusters: u64,
    /// Those that are stored compressed.
    pub compressed_clusters: u64,
    /// Those that don't directly follow their predecessor in the file.
    pub fragmented_clusters: u64,
}

impl CheckReport {
    /// True if nothing is wrong (any more).
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0
    }

    pub(super) fn corruption(&mut self, message: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.find(Severity::Corruption, message);
    }

    pub(super) fn leak(&mut self, message: impl FnOnce() -> String) {
        self.leaks += 1;
        self.find(Severity::Leak, message);
    }

    /// Keeps the message if there is room; corruptions have half of it for themselves.
    fn find(&mut self, severity: Severity, message: impl FnOnce() -> String) {
        let room = if severity == Severity::Leak { MAX_MESSAGES / 2 } else { MAX_MESSAGES };
        if self.findings.len() < room {
            self.findings.push(Finding { severity, message: message() });
        } else {
            self.omitted += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_and_leaks_do_not_crowd_out_corruptions() {
        let mut report = CheckReport::default();
        for _ in 0..10 * MAX_MESSAGES {
            report.leak(|| "leak".to_owned());
        }
        report.corruption(|| "bad".to_owned());
        assert_eq!((report.leaks, report.corruptions), (10 * MAX_MESSAGES as u64, 1));
        assert_eq!(report.findings.last().map(|f| f.severity), Some(Severity::Corruption));
        assert_eq!(report.findings.len() as u64 + report.omitted, report.leaks + report.corruptions);
        assert!(!report.is_clean());
    }
}
