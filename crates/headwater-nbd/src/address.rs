//! Which addresses of a host name count.

use std::net::IpAddr;

/// The addresses of a host name that may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum IpFamily {
    /// All.
    #[default]
    Any,
    /// Those of IPv4.
    V4,
    /// Those of IPv6.
    V6,
}

impl IpFamily {
    /// What QEMU's pair of switches means: one that is on excludes the other unless that is on too. `None` if both are off.
    pub fn from_switches(ipv4: Option<bool>, ipv6: Option<bool>) -> Option<Self> {
        match (ipv4, ipv6) {
            (Some(false), Some(false)) => None,
            (None, None) | (Some(true), Some(true)) => Some(Self::Any),
            (Some(true), _) | (_, Some(false)) => Some(Self::V4),
            (Some(false), _) | (_, Some(true)) => Some(Self::V6),
        }
    }

    /// Whether `address` is one of them.
    pub fn admits(self, address: IpAddr) -> bool {
        match self {
            Self::Any => true,
            Self::V4 => address.is_ipv4(),
            Self::V6 => address.is_ipv6(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switches_mean_what_they_mean_to_qemu() {
        use IpFamily::{Any, V4, V6};
        let (on, off) = (Some(true), Some(false));
        for (ipv4, ipv6, expected) in [
            (None, None, Some(Any)),
            (on, on, Some(Any)),
            (on, None, Some(V4)),
            (on, off, Some(V4)),
            (None, off, Some(V4)),
            (None, on, Some(V6)),
            (off, on, Some(V6)),
            (off, None, Some(V6)),
            (off, off, None),
        ] {
            assert_eq!(IpFamily::from_switches(ipv4, ipv6), expected, "{ipv4:?} {ipv6:?}");
        }
    }
}
