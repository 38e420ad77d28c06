//! SOURCE: a path, or the address of a server.

use headwater_nbd::NbdUri;
use headwater_storage::object::ObjectLocation;

/// Looks whether `text` is a path or an address that can be used.
///
/// # Errors
/// If it is an address of a scheme that isn't supported, or malformed.
pub fn parse(text: &str) -> Result<String, String> {
    if let Some((scheme, rest)) = text.split_once("://") {
        if NbdUri::is_nbd(text) {
            text.parse::<NbdUri>().map_err(|err| err.why)?;
        } else if ObjectLocation::is_object(text) {
            // Judged when it is opened: what is wrong with it may be a secret, and a refusal from here is told together with the text.
        } else if matches!(scheme, "http" | "https") {
            if rest.is_empty() || rest.starts_with(['/', ':', '?']) {
                return Err(format!("the host is missing; write {scheme}://HOST/PATH"));
            }
        } else if !scheme.contains('/') {
            return Err(format!(
                "{scheme}:// is not supported; use nbd://, nbd+unix://, nbds://, nbds+unix://, http://, https://, s3://, gs://, az:// or a path (./{text} for a file of that name)"
            ));
        }
    }
    if text.is_empty() { Err("it is empty".into()) } else { Ok(text.to_owned()) }
}

/// True if `text` is an address rather than a path.
pub fn is_uri(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| !scheme.contains('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_addresses_are_told_apart() {
        for good in [
            "a.raw",
            "./ftp://x",
            "nbd://h/x",
            "nbd+unix:///?socket=s",
            "nbds://h/x?tls-certificates=d",
            "http://h/x",
            "https://h:1/",
            "s3://bucket/key?endpoint=http://h:1",
        ] {
            assert_eq!(parse(good).as_deref(), Ok(good));
        }
        for bad in ["", "nbd://", "nbds://h/x", "ftp://h/x", "http://", "https:///x", "nbd+unix:///x"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(is_uri("nbd://h") && !is_uri("/a/b") && !is_uri("./x://y"));
    }
}
