//! Where a disk is served, as `--serve` takes it.

use headwater_export::vhost::{BlkOptions, LogicalBlock, MAX_QUEUES};
use headwater_nbd::NbdUri;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// What the address of a file starts with.
const FUSE: &str = "fuse:";

/// What the address of an NBD server starts with whose socket was handed over.
const ACTIVATED: &str = "nbd+fd:///";

/// What a vhost-user-blk address starts with.
const VHOST: &str = "vhost-user-blk:";

/// What the address of a block device starts with.
const UBLK: &str = "ublk:";

/// How many such devices the kernel can have.
const MAX_BLOCK_DEVICES: u32 = 1 << 20;

/// How many queues there are unless it is said: as many as a machine is likely to want. QEMU's makes one for each of its processors, and refuses
/// a server that has fewer; those that it doesn't use cost nothing.
const QUEUES: u16 = 64;

/// One place where clients find the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// An NBD server.
    Nbd(NbdUri),
    /// An NBD server at a socket that a service manager listens on.
    Activated(ActivatedAddress),
    /// A file.
    Fuse(FuseAddress),
    /// A Unix socket for a virtual machine.
    VhostUserBlk(VhostAddress),
    /// A block device of this machine.
    Ublk(UblkAddress),
}

/// A socket that was handed over, and the one export there: `nbd+fd:///NAME[?socket=SOCKET]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActivatedAddress {
    /// The export's name.
    pub export: String,
    /// What the socket is called; without it there must be one only.
    pub socket: Option<String>,
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

/// A Unix socket for a virtual machine, and how its guest sees the disk:
/// `vhost-user-blk:PATH[?num-queues=N][&logical-block-size=SIZE][&writethrough=on]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VhostAddress {
    /// The socket's path.
    pub path: PathBuf,
    /// Whether the guest may write is said elsewhere.
    pub options: BlkOptions,
}

/// A block device of this machine: `ublk:[NUMBER][?recover][&logical-block-size=SIZE]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UblkAddress {
    /// It is `/dev/ublkbNUMBER`; without one the kernel chooses.
    pub id: Option<u32>,
    /// If this program is killed, those who use the device wait until it is served again.
    pub recover: bool,
    /// The unit of requests, at most 4096 bytes.
    pub logical_block: LogicalBlock,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix(FUSE) {
            return rest.parse().map(Self::Fuse);
        }
        if let Some(rest) = text.strip_prefix(ACTIVATED) {
            return rest.parse().map(Self::Activated);
        }
        if let Some(rest) = text.strip_prefix(VHOST) {
            return rest.parse().map(Self::VhostUserBlk);
        }
        if let Some(rest) = text.strip_prefix(UBLK) {
            return rest.parse().map(Self::Ublk);
        }
        text.parse().map(Self::Nbd).map_err(|err: headwater_nbd::UriError| {
            format!("{err} (a file would be {FUSE}PATH, a socket for a virtual machine {VHOST}PATH, a block device {UBLK}[NUMBER])")
        })
    }
}

impl FromStr for ActivatedAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (export, options) = text.split_once('?').unwrap_or((text, ""));
        let socket = match options.split_once('=') {
            None if options.is_empty() => None,
            Some(("socket", name)) if !name.is_empty() => Some(name.to_owned()),
            _ => return Err(format!("unknown option '{options}' of {ACTIVATED}: there is socket=NAME")),
        };
        Ok(Self { export: export.to_owned(), socket })
    }
}

impl FromStr for FuseAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, options) = text.split_once('?').unwrap_or((text, ""));
        if path.is_empty() {
            return Err(format!("the path is missing; write {FUSE}PATH"));
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

impl FromStr for VhostAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, options) = text.split_once('?').unwrap_or((text, ""));
        if path.is_empty() {
            return Err(format!("the socket is missing; write {VHOST}PATH"));
        }
        let usual = BlkOptions { queues: QUEUES, ..BlkOptions::default() };
        let mut address = Self { path: path.into(), options: usual };
        for pair in options.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "num-queues" => {
                    let queues = value.parse().ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
                    address.options.queues = queues.ok_or_else(|| {
                        format!("num-queues={value}: it is a number from 1 to {MAX_QUEUES}")
                    })?;
                }
                "logical-block-size" => {
                    let size = crate::size::parse_size(value)?;
                    address.options.logical_block =
                        LogicalBlock::new(size).map_err(|error| error.to_string())?;
                }
                "writethrough" => {
                    address.options.writethrough = match value {
                        "on" => true,
                        "off" => false,
                        _ => return Err("writethrough= is on or off".to_owned()),
                    };
                }
                other => {
                    return Err(format!(
                        "unknown option {other:?}; there are num-queues, logical-block-size and writethrough"
                    ));
                }
            }
        }
        Ok(address)
    }
}

impl FromStr for UblkAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, options) = text.split_once('?').unwrap_or((text, ""));
        let id =
            match number {
                "" => None,
                number => Some(number.parse().ok().filter(|number| *number < MAX_BLOCK_DEVICES).ok_or_else(
                    || format!("{UBLK}{number}: the device's number is from 0 to {}", MAX_BLOCK_DEVICES - 1),
                )?),
            };
        let mut address = Self { id, recover: false, logical_block: LogicalBlock::default() };
        for option in options.split('&').filter(|option| !option.is_empty()) {
            match option.split_once('=').unwrap_or((option, "")) {
                ("recover", "") => address.recover = true,
                ("logical-block-size", value) => {
                    let size = crate::size::parse_size(value)?;
                    address.logical_block = LogicalBlock::new(size).map_err(|error| error.to_string())?;
                }
                (other, _) => {
                    return Err(format!(
                        "unknown option {other:?}; there are recover and logical-block-size"
                    ));
                }
            }
        }
        if address.recover && id.is_none() {
            return Err(format!(
                "a device that is to be recovered is found by its number: {UBLK}NUMBER?recover"
            ));
        }
        Ok(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nbd(uri) => uri.fmt(f),
            Self::Activated(address) => write!(f, "{ACTIVATED}{}", address.export),
            Self::Fuse(address) => write!(f, "{}", address.path.display()),
            Self::VhostUserBlk(address) => write!(f, "{VHOST}{}", address.path.display()),
            Self::Ublk(UblkAddress { id: Some(id), .. }) => write!(f, "/dev/ublkb{id}"),
            Self::Ublk(_) => f.write_str(UBLK),
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
        for (text, said) in [("fuse:", "the path"), ("fuse:x?y", "'y'"), ("disk", "fuse:PATH")] {
            let refused = text.parse::<Address>().unwrap_err();
            assert!(refused.contains(said), "{text}: {refused}");
        }
        assert!(matches!("nbd://localhost/x".parse(), Ok(Address::Nbd(_))));
    }

    #[test]
    fn a_socket_that_was_handed_over_may_have_a_name() {
        let activated = |text: &str| match text.parse() {
            Ok(Address::Activated(address)) => Some(address),
            _ => None,
        };
        let plain = ActivatedAddress { export: "disk".into(), socket: None };
        assert_eq!(activated("nbd+fd:///disk"), Some(plain.clone()));
        assert_eq!(
            activated("nbd+fd:///disk?socket=a"),
            Some(ActivatedAddress { socket: Some("a".into()), ..plain })
        );
        assert_eq!(activated("nbd+fd:///").unwrap().export, "");
        for wrong in ["nbd+fd:///disk?socket=", "nbd+fd:///disk?fd=3", "nbd+fd://3/disk"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_socket_for_a_machine_may_have_options() {
        let Ok(Address::VhostUserBlk(plain)) = "vhost-user-blk:/run/disk.sock".parse() else { panic!() };
        assert_eq!(plain.path.to_str(), Some("/run/disk.sock"));
        assert_eq!(plain.options, BlkOptions { queues: QUEUES, ..BlkOptions::default() });
        let text = "vhost-user-blk:d.sock?num-queues=4&logical-block-size=4K&writethrough=on";
        let Ok(Address::VhostUserBlk(full)) = text.parse() else { panic!() };
        let logical_block = LogicalBlock::new(4096).unwrap();
        let options = BlkOptions { queues: 4, logical_block, writethrough: true, ..BlkOptions::default() };
        assert_eq!(full, VhostAddress { path: "d.sock".into(), options });
    }

    #[test]
    fn a_block_device_has_a_number_or_gets_one() {
        let device = |text: &str| match text.parse() {
            Ok(Address::Ublk(address)) => address,
            other => panic!("{text}: {other:?}"),
        };
        let any = UblkAddress { id: None, recover: false, logical_block: LogicalBlock::default() };
        assert_eq!(device("ublk:"), any);
        assert_eq!(device("ublk:3"), UblkAddress { id: Some(3), ..any });
        let logical_block = LogicalBlock::new(4096).unwrap();
        let full = UblkAddress { id: Some(0), recover: true, logical_block };
        assert_eq!(device("ublk:0?recover&logical-block-size=4K"), full);
        assert_eq!(Address::Ublk(full).to_string(), "/dev/ublkb0");
        for (text, said) in [
            ("ublk:x", "number"),
            ("ublk:1048576", "1048575"),
            ("ublk:?recover", "NUMBER"),
            ("ublk:1?recover=on", "recover"),
            ("ublk:1?size=2", "size"),
            ("ublk:1?logical-block-size=3", "power of two"),
        ] {
            let refused = text.parse::<Address>().unwrap_err();
            assert!(refused.contains(said), "{text}: {refused}");
        }
    }

    #[test]
    fn other_addresses_are_of_nbd_or_wrong() {
        assert!(matches!("nbd://localhost/x".parse(), Ok(Address::Nbd(_))));
        for wrong in [
            "vhost-user-blk:",
            "vhost-user-blk:?num-queues=1",
            "vhost-user-blk:x?num-queues=0",
            "vhost-user-blk:x?num-queues=257",
            "vhost-user-blk:x?logical-block-size=1000",
            "vhost-user-blk:x?writethrough",
            "vhost-user-blk:x?size=1",
            "vhost-user:x",
            "/run/disk.sock",
        ] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
