//! Addresses of HTTP servers: what is accepted, and where a redirect leads.

use headwater_block::{Error, ErrorKind, Result};
use hyper::Uri;

/// An address that can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) tls: bool,
    /// Host name or literal address, without the brackets of IPv6.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// For the `Host` header: with brackets, and with the port if it isn't the scheme's.
    pub(crate) authority: String,
    /// Path and query.
    pub(crate) path: String,
}

impl Target {
    /// An address as the user wrote it.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            let message = format!("bad address {:?}: {why}; expected http://HOST[:PORT]/PATH", label(text));
            Error::new(ErrorKind::InvalidInput, message)
        };
        let uri: Uri = text.parse().map_err(|e| bad(&format!("{e}")))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("it is neither http:// nor https://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("the host is missing"))?;
        if authority.as_str().contains('@') {
            return Err(bad("a user name and password in the address are not supported"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(bad("the host is missing"));
        }
        let standard = if tls { 443 } else { 80 };
        let after_host = authority.as_str().strip_prefix(authority.host()).unwrap_or_default();
        let port = match (authority.port_u16(), after_host) {
            (Some(port), _) => port,
            (None, "" | ":") => standard,
            (None, _) => return Err(bad("the port is not a number below 65536")),
        };
        let with_port = if port == standard {
            authority.host().to_owned()
        } else {
            format!("{}:{port}", authority.host())
        };
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Self { tls, host: host.to_owned(), port, authority: with_port, path })
    }

    /// That no request can be made of it.
    pub(crate) fn bad(&self, why: &dyn std::fmt::Display) -> Error {
        let message = format!("cannot make a request for {} of {}: {why}", label(&self.path), self.authority);
        Error::new(ErrorKind::InvalidInput, message)
    }

    /// Where `location`, the header of a redirect, leads from here. Going from https to http is refused.
    pub(crate) fn follow(&self, location: &str) -> Result<Self> {
        let scheme = if self.tls { "https" } else { "http" };
        let location = location.split('#').next().unwrap_or_default();
        let text = if location.contains("://") {
            location.to_owned()
        } else if let Some(rest) = location.strip_prefix("//") {
            format!("{scheme}://{rest}")
        } else {
            let path = self.path.split('?').next().unwrap_or("/");
            let path = match location.as_bytes().first() {
                Some(b'/') => location.to_owned(),
                Some(b'?') => format!("{path}{location}"),
                _ => format!("{}/{location}", path.rsplit_once('/').map_or("", |(parent, _)| parent)),
            };
            format!("{scheme}://{}{path}", self.authority)
        };
        let target = Self::parse(&text).map_err(|e| e.context("redirected"))?;
        if self.tls && !target.tls {
            let message =
                format!("redirected from https to {}, which is not encrypted; refused", label(&text));
            return Err(Error::new(ErrorKind::NotAllowed, message));
        }
        Ok(target)
    }
}

/// An address for messages: without its query, which may hold a signature.
pub(crate) fn label(text: &str) -> String {
    match text.split_once('?') {
        Some((address, _)) => format!("{address}?..."),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let t = Target::parse("https://Example.org/a/b.img?x=1").unwrap();
        assert!(t.tls);
        assert_eq!((t.port, t.authority.as_str(), t.path.as_str()), (443, "Example.org", "/a/b.img?x=1"));
        let t = Target::parse("http://[::1]:8080").unwrap();
        assert_eq!((t.host.as_str(), t.port, t.authority.as_str()), ("::1", 8080, "[::1]:8080"));
        assert_eq!(t.path, "/");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for bad in ["http://", "ftp://a/b", "http://u:p@h/x", "http://h:99999/", "http://a b/", "https:///x"]
        {
            let e = Target::parse(bad).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{bad}: {e}");
        }
        assert!(!Target::parse("http://u:p@h/x?secret").unwrap_err().to_string().contains("secret"));
    }

    #[test]
    fn redirects_lead_where_they_say() {
        let from = Target::parse("http://h:81/a/b?q").unwrap();
        for (location, to) in [
            ("c", "http://h:81/a/c"),
            ("/c?d#e", "http://h:81/c?d"),
            ("?z", "http://h:81/a/b?z"),
            ("//other/x", "http://other/x"),
            ("https://h/x", "https://h/x"),
        ] {
            assert_eq!(from.follow(location).unwrap(), Target::parse(to).unwrap(), "{location}");
        }
        let secure = Target::parse("https://h/a").unwrap();
        assert_eq!(secure.follow("http://h/a").unwrap_err().kind(), ErrorKind::NotAllowed);
        assert!(from.follow("ftp://h/a").is_err());
    }
}
