//! What a response's status and headers mean: whether its body is the range that was asked for, of the object that was opened.
//!
//! Nothing here does I/O.

use headwater_block::{Error, ErrorKind};
use hyper::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, LAST_MODIFIED, LOCATION,
    RETRY_AFTER,
};
use hyper::{Response, StatusCode};
use std::ops::Range;
use std::time::Duration;

/// Which object it is: what must not change while it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// Its size in bytes.
    pub(super) size: u64,
    pub(super) etag: Option<String>,
    pub(super) last_modified: Option<String>,
}

impl Identity {
    /// An ETag that may be used in conditions: a weak one (`W/`) never matches in those for ranges.
    pub(super) fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }

    /// How `now` differs, if it does.
    fn difference(&self, now: &Identity) -> Option<String> {
        let show = |value: &Option<String>| value.as_deref().unwrap_or("none").to_owned();
        if self.size != now.size {
            Some(format!("its size was {} bytes and is {}", self.size, now.size))
        } else if self.etag != now.etag {
            Some(format!("its ETag was {} and is {}", show(&self.etag), show(&now.etag)))
        } else if self.last_modified != now.last_modified {
            let (then, now) = (show(&self.last_modified), show(&now.last_modified));
            Some(format!("its Last-Modified was {then:?} and is {now:?}"))
        } else {
            None
        }
    }
}

/// Why a response does not bring what was asked for.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// Worth trying again, not before the time that the server wants.
    Again(Error, Option<Duration>),
    /// The object is elsewhere: the `Location`.
    Moved(String),
    /// The server refuses or lacks it; it may have been moved by a redirect that is no longer good.
    Refused(Error),
    /// Trying again is of no use.
    Fatal(Error),
}

impl Failure {
    pub(crate) fn fatal(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Fatal(Error::new(kind, message))
    }

    pub(crate) fn again(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Again(Error::new(kind, message), None)
    }
}

pub(crate) fn text(headers: &HeaderMap, name: HeaderName) -> Option<String> {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// A `Content-Range` header: the range (none if it could not be satisfied) and the size of the whole.
fn parse_content_range(value: &str) -> Option<(Option<Range<u64>>, u64)> {
    let number = |digits: &str| {
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        if plain { digits.parse::<u64>().ok() } else { None }
    };
    let (unit, rest) = value.trim().split_once(' ')?;
    let (range, size) = rest.trim().split_once('/')?;
    let size = number(size)?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    if range == "*" {
        return Some((None, size));
    }
    let (first, last) = range.split_once('-')?;
    let range = number(first)?..number(last)?.checked_add(1)?;
    (range.start < range.end && range.end <= size).then_some((Some(range), size))
}

/// The object that a response without a body of its own (416, or 200 with nothing) tells of: an empty one.
fn empty_identity(headers: &HeaderMap) -> Identity {
    Identity { size: 0, etag: text(headers, ETAG), last_modified: text(headers, LAST_MODIFIED) }
}

/// Judges the answer to a request for `asked`. Gives the object's identity; the body is then exactly the part of `asked` that lies within
/// the object. `pinned` is the identity that was found when the object was opened.
pub(super) fn judge<B>(
    response: &Response<B>,
    asked: &Range<u64>,
    pinned: Option<&Identity>,
) -> Result<Identity, Failure> {
    let headers = response.headers();
    let status = response.status();
    match status {
        StatusCode::PARTIAL_CONTENT => {}
        StatusCode::RANGE_NOT_SATISFIABLE => {
            return match (text(headers, CONTENT_RANGE).as_deref().and_then(parse_content_range), pinned) {
                (_, Some(pinned)) => Err(changed(&format!(
                    "the server says that it is shorter than the {} bytes it had",
                    pinned.size
                ))),
                (Some((None, 0)), None) => Ok(empty_identity(headers)),
                _ => Err(Failure::fatal(
                    ErrorKind::Unsupported,
                    "the server refuses a range from the start (416 Range Not Satisfiable)",
                )),
            };
        }
        StatusCode::OK => return not_partial(headers, pinned),
        _ => return Err(refusal(status, headers)),
    }
    if let Some(encoding) = text(headers, CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity")) {
        let message = format!("the server sends it encoded ({encoding}), although that was not asked for");
        return Err(Failure::fatal(ErrorKind::Unsupported, message));
    }
    let Some(header) = text(headers, CONTENT_RANGE) else {
        let message = "the response 206 has no Content-Range header, so it is unknown which bytes it brings";
        return Err(Failure::fatal(ErrorKind::Corrupt, message));
    };
    let Some((Some(range), size)) = parse_content_range(&header) else {
        let message = format!("the response's Content-Range {header:?} does not tell a range and a size");
        return Err(Failure::fatal(ErrorKind::Corrupt, message));
    };
    let identity = Identity { size, etag: text(headers, ETAG), last_modified: text(headers, LAST_MODIFIED) };
    if let Some(difference) = pinned.and_then(|pinned| pinned.difference(&identity)) {
        return Err(changed(&difference));
    }
    if range.start != asked.start || range.end != asked.end.min(size) {
        let (first, last) = (asked.start, asked.end - 1);
        let message = format!("asked for bytes {first}-{last}, the server answers with {header:?}");
        return Err(Failure::fatal(ErrorKind::Corrupt, message));
    }
    // A body without Content-Length is in chunks; its length is counted when it is received.
    if let Some(length) = text(headers, CONTENT_LENGTH)
        && length.trim().parse() != Ok(range.end - range.start)
    {
        let message =
            format!("the response's Content-Length {length} does not match its Content-Range {header:?}");
        return Err(Failure::fatal(ErrorKind::Corrupt, message));
    }
    Ok(identity)
}

/// A 200: the server ignores ranges, or the condition of a range did not hold.
fn not_partial(headers: &HeaderMap, pinned: Option<&Identity>) -> Result<Identity, Failure> {
    let length = text(headers, CONTENT_LENGTH).and_then(|length| length.trim().parse::<u64>().ok());
    if length == Some(0) && pinned.is_none() {
        return Ok(empty_identity(headers));
    }
    if let (Some(pinned), Some(size)) = (pinned, length) {
        let now = Identity { size, ..empty_identity(headers) };
        if let Some(difference) = pinned.difference(&now) {
            return Err(changed(&difference));
        }
    }
    let message = "the server answers 200 to a Range request: it cannot send parts of the file. Use a server that \
                   supports ranges, or download the file first";
    Err(Failure::fatal(ErrorKind::Unsupported, message))
}

fn changed(difference: &str) -> Failure {
    let message = format!("the source has changed since it was opened: {difference}");
    Failure::fatal(ErrorKind::SourceChanged, message)
}

fn refusal(status: StatusCode, headers: &HeaderMap) -> Failure {
    let answer = format!("the server answers {status}");
    match status {
        StatusCode::MOVED_PERMANENTLY
        | StatusCode::FOUND
        | StatusCode::SEE_OTHER
        | StatusCode::TEMPORARY_REDIRECT
        | StatusCode::PERMANENT_REDIRECT => match text(headers, LOCATION) {
            Some(location) => Failure::Moved(location),
            None => Failure::fatal(ErrorKind::Corrupt, format!("{answer} without saying where to go")),
        },
        StatusCode::PRECONDITION_FAILED => changed(&answer),
        StatusCode::NOT_FOUND | StatusCode::GONE => Failure::Refused(Error::new(ErrorKind::NotFound, answer)),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            Failure::Refused(Error::new(ErrorKind::PermissionDenied, answer))
        }
        StatusCode::NOT_IMPLEMENTED | StatusCode::HTTP_VERSION_NOT_SUPPORTED => {
            Failure::fatal(ErrorKind::Unsupported, answer)
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => {
            Failure::Again(Error::new(ErrorKind::Unavailable, answer), retry_after(headers))
        }
        _ if status.is_server_error() => {
            Failure::Again(Error::new(ErrorKind::Unavailable, answer), retry_after(headers))
        }
        _ => Failure::fatal(ErrorKind::Io, answer),
    }
}

/// How long the server wants to be left alone, if it says so in seconds. (It may also name a date, or no time at all; then our own pauses apply: without any, a
/// server that is busy would be asked as fast as it can answer.)
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = text(headers, RETRY_AFTER)?.trim().parse().ok().filter(|seconds| *seconds > 0);
    seconds.map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(status: u16, headers: &[(&str, &str)]) -> Response<()> {
        let mut builder = Response::builder().status(status);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    fn identity(size: u64) -> Identity {
        Identity { size, etag: Some("\"a\"".into()), last_modified: None }
    }

    fn kind(result: Result<Identity, Failure>) -> ErrorKind {
        match result {
            Err(Failure::Fatal(e) | Failure::Refused(e) | Failure::Again(e, _)) => e.kind(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_good_answer_tells_the_identity() {
        let good =
            response(206, &[("content-range", "bytes 0-9/100"), ("content-length", "10"), ("etag", "\"a\"")]);
        assert_eq!(judge(&good, &(0..10), None).unwrap(), identity(100));
        assert_eq!(judge(&good, &(0..10), Some(&identity(100))).unwrap(), identity(100));
        let short = response(206, &[("content-range", "bytes 0-9/10"), ("content-length", "10")]);
        assert_eq!(judge(&short, &(0..65536), None).unwrap().size, 10);
        let empty = response(416, &[("content-range", "bytes */0")]);
        assert_eq!(judge(&empty, &(0..65536), None).unwrap().size, 0);
    }

    #[test]
    fn answers_that_bring_something_else_are_refused() {
        let pinned = identity(100);
        for (headers, expected) in [
            (&[][..], ErrorKind::Corrupt),
            (&[("content-range", "bytes 0-9/*")], ErrorKind::Corrupt),
            (&[("content-range", "bytes 9-0/100")], ErrorKind::Corrupt),
            (&[("content-range", "bytes 0-18446744073709551615/100")], ErrorKind::Corrupt),
            (&[("content-range", "lines 0-9/100")], ErrorKind::Corrupt),
            (&[("etag", "\"a\""), ("content-range", "bytes 1-10/100")], ErrorKind::Corrupt),
            (&[("etag", "\"a\""), ("content-range", "bytes 0-4/100")], ErrorKind::Corrupt),
            (
                &[("etag", "\"a\""), ("content-range", "bytes 0-9/100"), ("content-length", "11")],
                ErrorKind::Corrupt,
            ),
            (&[("content-encoding", "gzip"), ("content-range", "bytes 0-9/100")], ErrorKind::Unsupported),
            (&[("etag", "\"b\""), ("content-range", "bytes 0-9/100")], ErrorKind::SourceChanged),
            (&[("content-range", "bytes 0-9/100")], ErrorKind::SourceChanged),
            (&[("etag", "\"a\""), ("content-range", "bytes 0-9/101")], ErrorKind::SourceChanged),
        ] {
            assert_eq!(
                kind(judge(&response(206, headers), &(0..10), Some(&pinned))),
                expected,
                "{headers:?}"
            );
        }
    }

    #[test]
    fn statuses_say_what_to_do() {
        let pinned = identity(100);
        let judge = |status, headers: &[_]| judge(&response(status, headers), &(0..10), Some(&pinned));
        assert_eq!(kind(judge(200, &[("content-length", "100"), ("etag", "\"a\"")])), ErrorKind::Unsupported);
        assert_eq!(
            kind(judge(200, &[("content-length", "100"), ("etag", "\"b\"")])),
            ErrorKind::SourceChanged
        );
        assert_eq!(kind(judge(412, &[])), ErrorKind::SourceChanged);
        assert_eq!(kind(judge(416, &[])), ErrorKind::SourceChanged);
        assert_eq!(kind(judge(404, &[])), ErrorKind::NotFound);
        assert_eq!(kind(judge(403, &[])), ErrorKind::PermissionDenied);
        assert_eq!(kind(judge(418, &[])), ErrorKind::Io);
        let busy = judge(503, &[("retry-after", "7")]);
        assert!(matches!(busy, Err(Failure::Again(_, Some(wait))) if wait == Duration::from_secs(7)));
        let dated = judge(429, &[("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT")]);
        assert!(matches!(dated, Err(Failure::Again(_, None))));
        let at_once = judge(503, &[("retry-after", "0")]);
        assert!(matches!(at_once, Err(Failure::Again(_, None))));
        assert!(matches!(judge(302, &[("location", "/x")]), Err(Failure::Moved(to)) if to == "/x"));
        assert_eq!(kind(judge(302, &[])), ErrorKind::Corrupt);
    }
}
