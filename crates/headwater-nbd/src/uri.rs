//! NBD addresses as people write them: `nbd://host[:port]/export` and `nbd+unix:///export?socket=path`.
//!
//! The syntax is that of the NBD project's `doc/uri.md`. Percent-encoding is undone in the export's name, the host and the
//! socket's path. TLS (`nbds`) and vsock are refused by name.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

/// The port that IANA assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Longest name of an export that the protocol allows, in bytes.
const MAX_EXPORT_NAME: usize = 4096;

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NbdAddress {
    /// TCP.
    Tcp {
        /// Name or literal address, without the brackets of IPv6.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

/// An address and the export wanted there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: NbdAddress,
    /// The export's name; empty for the server's default export.
    pub export: String,
}

/// What is wrong with an NBD URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad NBD address {uri:?}: {why}")]
pub struct UriError {
    /// The text that was given.
    pub uri: String,
    /// What is wrong, and what to write instead.
    pub why: String,
}

impl NbdUri {
    /// Whether `text` looks like an NBD URI, right or wrong, rather than a file name.
    pub fn is_nbd(text: &str) -> bool {
        text.split_once("://").is_some_and(|(scheme, _)| {
            let scheme = scheme.to_ascii_lowercase();
            let kind = scheme.split_once('+').map_or(scheme.as_str(), |(kind, _)| kind);
            kind == "nbd" || kind == "nbds"
        })
    }
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        parse(text).map_err(|why| UriError { uri: text.to_owned(), why })
    }
}

fn parse(text: &str) -> Result<NbdUri, String> {
    let (scheme, rest) = text
        .split_once("://")
        .ok_or("expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")?;
    let unix = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => false,
        "nbd+unix" => true,
        tls @ ("nbds" | "nbds+unix" | "nbds+vsock") => {
            return Err(format!(
                "{tls} means TLS, which is not supported; use nbd:// over a trusted network or a tunnel"
            ));
        }
        other => return Err(format!("unknown scheme {other}; expected nbd:// or nbd+unix://")),
    };
    if rest.contains('#') {
        return Err("a fragment (#) is not allowed; write %23 for a literal #".to_owned());
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = String::from_utf8(percent_decode(path)?)
        .map_err(|_| "the export's name is not valid UTF-8".to_owned())?;
    if export.len() > MAX_EXPORT_NAME {
        return Err(format!(
            "the export's name has {} bytes, at most {MAX_EXPORT_NAME} are allowed",
            export.len()
        ));
    }
    let socket = socket_parameter(query, unix)?;
    let address = match socket {
        Some(_) if !authority.is_empty() => {
            return Err(
                "nbd+unix:// takes no host; write three slashes: nbd+unix:///EXPORT?socket=PATH".to_owned()
            );
        }
        Some(path) => NbdAddress::Unix { path },
        None => parse_authority(authority)?,
    };
    Ok(NbdUri { address, export })
}

/// The `socket` parameter, which a Unix address must have and a TCP address must not.
fn socket_parameter(query: Option<&str>, unix: bool) -> Result<Option<PathBuf>, String> {
    let mut socket = None;
    for pair in query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "socket" if !unix => return Err("socket= belongs to nbd+unix://, not to nbd://".to_owned()),
            "socket" if socket.is_some() => return Err("socket= is given twice".to_owned()),
            "socket" => {
                let path = percent_decode(value)?;
                if path.is_empty() || path.contains(&0) {
                    return Err("socket= needs the path of a Unix socket".to_owned());
                }
                socket = Some(PathBuf::from(OsString::from_vec(path)));
            }
            other => return Err(format!("unknown parameter {other:?}")),
        }
    }
    if unix && socket.is_none() {
        return Err("the socket is missing; write nbd+unix:///EXPORT?socket=PATH".to_owned());
    }
    Ok(socket)
}

fn parse_authority(authority: &str) -> Result<NbdAddress, String> {
    if authority.contains('@') {
        return Err("a user name serves TLS only, which is not supported".to_owned());
    }
    let (host, port) = if let Some(bracketed) = authority.strip_prefix('[') {
        let (host, rest) =
            bracketed.split_once(']').ok_or("the bracket of the IPv6 address is not closed")?;
        host.parse::<std::net::Ipv6Addr>().map_err(|_| format!("{host:?} is not an IPv6 address"))?;
        match rest.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if rest.is_empty() => (host, None),
            None => return Err(format!("unexpected {rest:?} after the IPv6 address")),
        }
    } else {
        match authority.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("an IPv6 address needs brackets: nbd://[ADDRESS]:PORT/EXPORT".to_owned());
            }
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    let host =
        String::from_utf8(percent_decode(host)?).map_err(|_| "the host is not valid UTF-8".to_owned())?;
    if host.is_empty() {
        return Err("the host is missing; write nbd://HOST[:PORT]/EXPORT (localhost for this machine), \
                    or nbd+unix:///EXPORT?socket=PATH"
            .to_owned());
    }
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => port
            .parse()
            .ok()
            .filter(|_| port.bytes().all(|b| b.is_ascii_digit()))
            .ok_or_else(|| format!("{port:?} is not a port number"))?,
    };
    Ok(NbdAddress::Tcp { host, port })
}

fn percent_decode(text: &str) -> Result<Vec<u8>, String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16));
        match (digit(), digit()) {
            // Two hexadecimal digits make at most 255.
            (Some(high), Some(low)) => decoded.push((high * 16 + low) as u8),
            _ => {
                return Err(
                    "% must be followed by two hexadecimal digits; write %25 for a literal %".to_owned()
                );
            }
        }
    }
    Ok(decoded)
}

/// Writes `bytes`, with what `keep` refuses percent-encoded.
fn percent_encode(f: &mut fmt::Formatter<'_>, bytes: &[u8], keep: &str) -> fmt::Result {
    for &byte in bytes {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || (c.is_ascii() && keep.contains(c)) {
            write!(f, "{c}")?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                f.write_str("nbd://")?;
                if host.contains(':') {
                    write!(f, "[{host}]")?;
                } else {
                    percent_encode(f, host.as_bytes(), "-._~")?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
                percent_encode(f, self.export.as_bytes(), "-._~/:@")
            }
            NbdAddress::Unix { path } => {
                f.write_str("nbd+unix:///")?;
                percent_encode(f, self.export.as_bytes(), "-._~/:@")?;
                f.write_str("?socket=")?;
                percent_encode(f, path.as_os_str().as_bytes(), "-._~/:@")
            }
        }
    }
}

#[cfg(test)]
mod tests;
