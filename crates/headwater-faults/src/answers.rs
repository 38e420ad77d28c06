//! What becomes of the answers of an HTTP server: rules, which are asked in their order for each request.

use std::time::Duration;

/// What happens to one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The server isn't asked: this status comes instead, with an empty body.
    Status {
        /// Such as 503 or 429.
        code: u16,
        /// Seconds for `Retry-After`.
        retry_after: Option<u64>,
    },
    /// It comes so much later.
    Late(Duration),
    /// The connection is lost after so many bytes of the body.
    CutBody(u64),
    /// Nothing comes after so many bytes of the body, until the proxy is healed or the connection cut.
    StallBody(u64),
    /// The body comes at so many bytes a second, at least one.
    Trickle(u64),
    /// `Content-Length` is this much off. With more, the body ends early and the connection with it; with less, the rest comes all the same.
    LengthOff(i64),
    /// The first number in `Content-Range` is this much off.
    RangeOff(i64),
    /// A bit in the middle of the body is flipped.
    Corrupt,
    /// `ETag` is this one.
    Etag(String),
}

/// What happens to which answers.
#[derive(Debug, Clone)]
pub struct Rule {
    pub(crate) answer: Answer,
    skip: u64,
    times: u64,
    one_in: u64,
    seen: u64,
}

impl Rule {
    /// It happens to all answers.
    pub fn new(answer: Answer) -> Self {
        Self { answer, skip: 0, times: u64::MAX, one_in: 1, seen: 0 }
    }

    /// Not to the first `n`.
    pub fn skip(self, n: u64) -> Self {
        Self { skip: n, ..self }
    }

    /// To `n` at most.
    pub fn times(self, n: u64) -> Self {
        Self { times: n, ..self }
    }

    /// To every `n`-th; `n` is at least 1.
    pub fn one_in(self, n: u64) -> Self {
        Self { one_in: n.max(1), ..self }
    }

    /// Counts an answer; true if it happens to this one.
    pub(crate) fn hits(&mut self) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.seen += 1;
        if self.times == 0 || !self.seen.is_multiple_of(self.one_in) {
            return false;
        }
        self.times -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_count() {
        let mut rule = Rule::new(Answer::Corrupt).skip(2).one_in(3).times(2);
        let hits: Vec<_> = (0..20).filter(|_| rule.hits()).collect();
        assert_eq!(hits, [4, 7]);
    }
}
