//! NBD addresses as people write them: `nbd://host[:port]/export` and `nbd+unix:///export?socket=path`.
//!
//! The syntax is that of the NBD project's `doc/uri.md`. Percent-encoding is undone in the export's name, the host and the
//! socket's path. `nbds` and `nbds+unix` mean TLS, with the certificates in a directory: `tls-certificates=DIRECTORY`, and if need be
//! `tls-hostname=NAME` and `tls-verify-peer=false`, or with the keys that both sides have in a file: `tls-psk-file=FILE`, as libnbd writes
//! them. Then a client says before the host which user it is: `nbds://USER@HOST/EXPORT?tls-psk-file=FILE`. vsock is refused by name.

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
    /// How to use TLS; without it, TLS is not used.
    pub tls: Option<UriTls>,
}

/// What a URI says of TLS: how the sides know each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UriTls {
    /// By certificates.
    Certificates {
        /// The directory that they are in.
        directory: PathBuf,
        /// The name that the server's certificate must be for, if not the host's.
        hostname: Option<String>,
        /// Whether the other side must prove itself.
        verify_peer: bool,
    },
    /// By a key that both have.
    Psk {
        /// The file of keys.
        keys: PathBuf,
        /// Who the client is; nobody if the address is a server's own, which takes all that are in the file.
        user: Option<String>,
    },
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
    /// An export without TLS.
    pub fn new(address: NbdAddress, export: impl Into<String>) -> Self {
        Self { address, export: export.into(), tls: None }
    }

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
    let (tls, unix) = match scheme.to_ascii_lowercase().as_str() {
        "nbd" => (false, false),
        "nbd+unix" => (false, true),
        "nbds" => (true, false),
        "nbds+unix" => (true, true),
        other => {
            return Err(format!(
                "unknown scheme {other}; expected nbd://, nbd+unix://, nbds:// or nbds+unix://"
            ));
        }
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
    let (user, authority) = match authority.split_once('@') {
        Some((user, host)) => (Some(user_name(user)?), host),
        None => (None, authority),
    };
    let Parameters { socket, tls } = parameters(query, unix, tls, user)?;
    let address = match socket {
        Some(_) if !authority.is_empty() => {
            return Err(
                "nbd+unix:// takes no host; write three slashes: nbd+unix:///EXPORT?socket=PATH".to_owned()
            );
        }
        Some(path) => NbdAddress::Unix { path },
        None => parse_authority(authority)?,
    };
    Ok(NbdUri { address, export, tls })
}

/// What follows the question mark.
struct Parameters {
    socket: Option<PathBuf>,
    tls: Option<UriTls>,
}

/// Reads the parameters: a Unix address must have a socket and a TCP address must not; TLS must have certificates or keys.
fn parameters(
    query: Option<&str>,
    unix: bool,
    tls: bool,
    user: Option<String>,
) -> Result<Parameters, String> {
    let (mut socket, mut certificates, mut hostname, mut verify_peer, mut keys) =
        (None, None, None, None, None);
    for pair in query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = percent_decode(value)?;
        match key {
            "socket" if !unix => return Err("socket= belongs to nbd+unix://, not to nbd://".to_owned()),
            "socket" => put(&mut socket, key, path(key, "the path of a Unix socket", value)?)?,
            "tls-certificates" | "tls-hostname" | "tls-verify-peer" | "tls-psk-file" if !tls => {
                return Err(format!("{key}= belongs to nbds:// and nbds+unix://"));
            }
            "tls-psk-file" => put(&mut keys, key, path(key, "a file", value)?)?,
            "tls-certificates" => put(&mut certificates, key, path(key, "a directory", value)?)?,
            "tls-hostname" => {
                let name = String::from_utf8(value).ok().filter(|name| !name.is_empty());
                put(&mut hostname, key, name.ok_or("tls-hostname= needs a name")?)?;
            }
            "tls-verify-peer" => {
                let verify = match value.as_slice() {
                    b"true" => true,
                    b"false" => false,
                    _ => return Err("tls-verify-peer= is true or false".to_owned()),
                };
                put(&mut verify_peer, key, verify)?;
            }
            other => return Err(format!("unknown parameter {other:?}")),
        }
    }
    if unix && socket.is_none() {
        return Err("the socket is missing; write nbd+unix:///EXPORT?socket=PATH".to_owned());
    }
    let for_certificates = hostname.is_some() || verify_peer.is_some();
    let tls = match (certificates, keys) {
        (Some(_), Some(_)) => {
            return Err("tls-certificates= and tls-psk-file= exclude each other".to_owned());
        }
        (None, Some(_)) if for_certificates => {
            return Err("tls-hostname= and tls-verify-peer= belong to tls-certificates=".to_owned());
        }
        (None, Some(keys)) => Some(UriTls::Psk { keys, user }),
        _ if user.is_some() => {
            return Err(
                "a user name belongs to keys; write nbds://USER@HOST/EXPORT?tls-psk-file=FILE".to_owned()
            );
        }
        (Some(directory), None) => {
            Some(UriTls::Certificates { directory, hostname, verify_peer: verify_peer.unwrap_or(true) })
        }
        (None, None) if tls => {
            return Err(
                "TLS needs certificates or keys; write nbds://HOST/EXPORT?tls-certificates=DIRECTORY \
                        or nbds://USER@HOST/EXPORT?tls-psk-file=FILE"
                    .to_owned(),
            );
        }
        (None, None) => None,
    };
    Ok(Parameters { socket, tls })
}

/// Keeps the value of a parameter, which may be given once.
fn put<T>(place: &mut Option<T>, key: &str, value: T) -> Result<(), String> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(format!("{key}= is given twice")),
    }
}

fn path(key: &str, what: &str, value: Vec<u8>) -> Result<PathBuf, String> {
    if value.is_empty() || value.contains(&0) {
        return Err(format!("{key}= needs {what}"));
    }
    Ok(PathBuf::from(OsString::from_vec(value)))
}

fn user_name(text: &str) -> Result<String, String> {
    let name = String::from_utf8(percent_decode(text)?).ok().filter(|name| !name.is_empty());
    name.ok_or_else(|| "before @ stands the name of a user, and nothing does".to_owned())
}

fn parse_authority(authority: &str) -> Result<NbdAddress, String> {
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
        const PLAIN: &str = "-._~/:@";
        f.write_str(if self.tls.is_some() { "nbds" } else { "nbd" })?;
        f.write_str(if matches!(self.address, NbdAddress::Unix { .. }) { "+unix://" } else { "://" })?;
        if let Some(UriTls::Psk { user: Some(user), .. }) = &self.tls {
            percent_encode(f, user.as_bytes(), "-._~")?;
            f.write_str("@")?;
        }
        let mut separator = '?';
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "[{host}]")?;
                } else {
                    percent_encode(f, host.as_bytes(), "-._~")?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
                percent_encode(f, self.export.as_bytes(), PLAIN)?;
            }
            NbdAddress::Unix { path } => {
                f.write_str("/")?;
                percent_encode(f, self.export.as_bytes(), PLAIN)?;
                f.write_str("?socket=")?;
                percent_encode(f, path.as_os_str().as_bytes(), PLAIN)?;
                separator = '&';
            }
        }
        match &self.tls {
            None => Ok(()),
            Some(UriTls::Certificates { directory, hostname, verify_peer }) => {
                write!(f, "{separator}tls-certificates=")?;
                percent_encode(f, directory.as_os_str().as_bytes(), PLAIN)?;
                if let Some(hostname) = hostname {
                    f.write_str("&tls-hostname=")?;
                    percent_encode(f, hostname.as_bytes(), PLAIN)?;
                }
                if *verify_peer { Ok(()) } else { f.write_str("&tls-verify-peer=false") }
            }
            Some(UriTls::Psk { keys, .. }) => {
                write!(f, "{separator}tls-psk-file=")?;
                percent_encode(f, keys.as_os_str().as_bytes(), PLAIN)
            }
        }
    }
}

#[cfg(test)]
mod tests;
