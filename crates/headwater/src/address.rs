//! Where a disk is served, as `--serve` takes it.

use headwater_nbd::NbdUri;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// One place where clients find the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// An NBD server.
    Nbd(NbdUri),
    /// A file.
    Fuse(FuseAddress),
}

/// A regular file over which the disk is mounted: `fuse:PATH[?growable][&allow-other]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseAddress {
    /// The file.
    pub path: PathBuf,
    /// Writing past the end makes the disk larger, and truncating changes its size.
    pub growable: bool,
    /// Other users may open it, as far as its mode allows.
    pub allow_other: bool,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("fuse:") {
            Some(rest) => rest.parse().map(Self::Fuse),
            None => text
                .parse()
                .map(Self::Nbd)
                .map_err(|err: headwater_nbd::UriError| format!("{err} (a file would be: fuse:PATH)")),
        }
    }
}

impl FromStr for FuseAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, options) = text.split_once('?').unwrap_or((text, ""));
        if path.is_empty() {
            return Err("a path is missing: fuse:PATH".to_owned());
        }
        let mut address = Self { path: path.into(), growable: false, allow_other: false };
        for option in options.split('&').filter(|option| !option.is_empty()) {
            match option {
                "growable" => address.growable = true,
                "allow-other" => address.allow_other = true,
                _ => return Err(format!("no option '{option}' of fuse: there are growable and allow-other")),
            }
        }
        Ok(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nbd(uri) => uri.fmt(f),
            Self::Fuse(FuseAddress { path, .. }) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let fuse = |text: &str| match text.parse() {
            Ok(Address::Fuse(address)) => address,
            other => panic!("{text}: {other:?}"),
        };
        let plain = FuseAddress { path: "/run/disk".into(), growable: false, allow_other: false };
        assert_eq!(fuse("fuse:/run/disk"), plain);
        assert_eq!(fuse("fuse:/run/disk?growable"), FuseAddress { growable: true, ..plain.clone() });
        let both = FuseAddress { growable: true, allow_other: true, ..plain };
        assert_eq!(fuse("fuse:/run/disk?allow-other&growable"), both);
        for (text, said) in [("fuse:", "a path"), ("fuse:x?y", "'y'"), ("disk", "fuse:PATH")] {
            let refused = text.parse::<Address>().unwrap_err();
            assert!(refused.contains(said), "{text}: {refused}");
        }
        assert!(matches!("nbd://localhost/x".parse(), Ok(Address::Nbd(_))));
    }
}
