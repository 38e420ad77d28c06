//! What an answer means that doesn't bring the range that was asked for. Nothing here does I/O.

use crate::http::answer::{Failure, retry_after, text};
use headwater_block::{Error, ErrorKind};
use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderName};
use std::fmt;

/// Why a request brings nothing, on its way through the crate `object_store`.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub(super) failure: Failure,
    /// The request wasn't for the object, but for the right to it.
    pub(super) about_credentials: bool,
    /// A server said so, not the network.
    pub(super) answered: bool,
    /// There is no byte to be had, because the object is empty or shorter than thought.
    pub(super) empty: bool,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.failure {
            Failure::Again(err, _) | Failure::Refused(err) | Failure::Fatal(err) => write!(f, "{err}"),
            Failure::Moved(_) => write!(f, "the server redirects"),
        }
    }
}

impl std::error::Error for Refusal {}

impl Refusal {
    /// The refusal among the causes of `err`, if one is.
    pub(super) fn of<'a>(err: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        let mut cause = Some(err);
        while let Some(err) = cause {
            if let Some(refusal) = err.downcast_ref() {
                return Some(refusal);
            }
            cause = err.source();
        }
        None
    }
}

/// Judges an answer that isn't a part of the object.
pub(super) fn judge(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Refusal {
    let body = String::from_utf8_lossy(body);
    let code = element(&body, "Code")
        .or_else(|| text(headers, HeaderName::from_static("x-ms-error-code")))
        .unwrap_or_default();
    let said = match (code.as_str(), element(&body, "Message")) {
        ("", None) => String::new(),
        ("", Some(message)) => format!(" ({message})"),
        (code, None) => format!(" ({code})"),
        (code, Some(message)) => format!(" ({code}: {message})"),
    };
    let answer = format!("the server answers {status}{said}");
    let fatal = |kind, advice: &str| Failure::fatal(kind, format!("{answer}{advice}"));
    let failure = match status {
        StatusCode::OK => Failure::fatal(
            ErrorKind::Unsupported,
            "the server answers 200 to a request for a range: it cannot send parts of the object",
        ),
        StatusCode::PRECONDITION_FAILED | StatusCode::NOT_MODIFIED => {
            fatal(ErrorKind::SourceChanged, ": it was replaced")
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => fatal(ErrorKind::NotFound, ""),
        _ if ["ExpiredToken", "RequestTimeTooSkewed", "RequestExpired", "TokenRefreshRequired"]
            .contains(&code.as_str()) =>
        {
            let advice = if code == "RequestTimeTooSkewed" {
                "; set this machine's clock"
            } else {
                "; get new credentials"
            };
            fatal(ErrorKind::PermissionDenied, advice)
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => fatal(ErrorKind::PermissionDenied, ""),
        StatusCode::MOVED_PERMANENTLY | StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => {
            fatal(ErrorKind::InvalidInput, ": the bucket is in another region; set AWS_REGION, or ?region=")
        }
        StatusCode::BAD_REQUEST if code == "AuthorizationHeaderMalformed" => {
            fatal(ErrorKind::InvalidInput, "; set AWS_REGION, or ?region=, to the bucket's region")
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            Failure::Again(Error::new(ErrorKind::Unavailable, answer), retry_after(headers))
        }
        StatusCode::NOT_IMPLEMENTED => fatal(ErrorKind::Unsupported, ""),
        _ if status.is_server_error() => {
            Failure::Again(Error::new(ErrorKind::Unavailable, answer), retry_after(headers))
        }
        _ => fatal(ErrorKind::Io, ""),
    };
    let empty = status == StatusCode::RANGE_NOT_SATISFIABLE;
    Refusal { failure, about_credentials: false, answered: true, empty }
}

/// The text of an element of XML, fit for a message.
fn element(body: &str, name: &str) -> Option<String> {
    let (_, rest) = body.split_once(&format!("<{name}>"))?;
    let (text, _) = rest.split_once('<')?;
    let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    (!text.trim().is_empty()).then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: u16, headers: &[(&'static str, &'static str)], body: &str) -> (ErrorKind, String) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        let refusal = judge(StatusCode::from_u16(status).unwrap(), &map, body.as_bytes());
        match refusal.failure {
            Failure::Again(err, _) | Failure::Fatal(err) => (err.kind(), err.to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_stores_say_is_told_with_advice() {
        let xml = "<?xml?><Error><Code>NoSuchKey</Code><Message>no\nsuch key</Message></Error>";
        let (kind, text) = judged(404, &[], xml);
        assert_eq!(kind, ErrorKind::NotFound);
        assert!(text.contains("(NoSuchKey: nosuch key)"), "{text}");
        let expired = "<Error><Code>ExpiredToken</Code></Error>";
        assert_eq!(judged(400, &[], expired).0, ErrorKind::PermissionDenied);
        assert_eq!(judged(403, &[], "").0, ErrorKind::PermissionDenied);
        assert_eq!(judged(412, &[], "").0, ErrorKind::SourceChanged);
        assert_eq!(judged(200, &[], "").0, ErrorKind::Unsupported);
        assert_eq!(judged(503, &[], "").0, ErrorKind::Unavailable);
        assert!(judged(301, &[], "").1.contains("AWS_REGION"));
        assert!(judged(409, &[("x-ms-error-code", "Busy")], "").1.contains("(Busy)"));
    }

    #[test]
    fn a_server_that_wants_rest_gets_it() {
        let mut headers = HeaderMap::new();
        headers.insert("retry-after", "7".parse().unwrap());
        let refusal = judge(StatusCode::TOO_MANY_REQUESTS, &headers, b"");
        let wanted = std::time::Duration::from_secs(7);
        assert!(matches!(refusal.failure, Failure::Again(_, Some(rest)) if rest == wanted));
    }
}
