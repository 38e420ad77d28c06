//! The JSON of the wire: a stream of values, read as its bytes arrive, and the text of values that are sent.
//!
//! The dialect is that of QEMU: strings may stand in single quotes, values need nothing between them, and whatever is
//! wrong yields one error, after which reading goes on. Errors carry QEMU's words, because clients show them.

mod encode;
mod lexer;
mod parser;
mod text;

use serde_json::Value;

pub use encode::{Style, encode};
use lexer::{Lexer, Step};
use parser::Parser;

/// Longest message, in bytes; white space between tokens doesn't count.
pub const MAX_MESSAGE: usize = 16 << 20;

/// Most arrays and objects that may be open at once.
pub const MAX_NESTING: i32 = 1024;

/// Most tokens of one message.
pub const MAX_TOKENS: usize = 2 << 20;

/// What is wrong with the text of a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyntaxError {
    /// The bytes are no JSON.
    #[error("JSON parse error, {0}")]
    Parse(String),
    /// More than [`MAX_NESTING`] brackets are open.
    #[error("JSON nesting depth limit exceeded")]
    Nesting,
    /// The message has more than [`MAX_TOKENS`] tokens.
    #[error("JSON token count limit exceeded")]
    Tokens,
    /// The message is longer than [`MAX_MESSAGE`].
    #[error("JSON token size limit exceeded")]
    Size,
    /// There is no value where one was to be.
    #[error("Expecting a JSON value")]
    Empty,
    /// Something follows the one value that was to be there.
    #[error("Expecting at most one JSON value")]
    Several,
}

impl SyntaxError {
    fn parse(why: impl Into<String>) -> Self {
        Self::Parse(why.into())
    }

    fn premature_end() -> Self {
        Self::parse("premature EOI")
    }

    /// `token` cannot be one. Text ends at a zero byte, as it does for QEMU.
    fn stray(token: &[u8]) -> Self {
        let shown = token.split(|&b| b == 0).next().unwrap_or_default();
        Self::parse(format!("stray '{}'", text::lossy(shown)))
    }
}

/// Reads values from a stream of bytes that arrives in pieces.
///
/// Work is linear in the bytes pushed, however they are cut. Memory is bounded by what was pushed and not yet taken with
/// [`Reader::next`], plus one message.
#[derive(Debug)]
pub struct Reader {
    input: Vec<u8>,
    /// How much of `input` was read.
    at: usize,
    lexer: Lexer,
    parser: Parser,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// A reader that has seen nothing.
    pub fn new() -> Self {
        Self { input: Vec::new(), at: 0, lexer: Lexer::new(), parser: Parser::default() }
    }

    /// Appends bytes that were received.
    pub fn push(&mut self, bytes: &[u8]) {
        // What was read is dropped when it is at least half, so that each byte is moved at most once on average.
        if self.at * 2 >= self.input.len() {
            self.input.drain(..self.at);
            self.at = 0;
        }
        self.input.extend_from_slice(bytes);
    }

    /// The next value or error in what was pushed; `None` until there is more.
    ///
    /// Numbers and bare words end only at the byte after them.
    #[expect(clippy::should_implement_trait, reason = "an iterator that ended would not go on after a push")]
    pub fn next(&mut self) -> Option<Result<Value, SyntaxError>> {
        while let Some(&byte) = self.input.get(self.at) {
            let step = self.lexer.step(byte);
            let kind = match step {
                Step::TokenBefore(kind) => kind,
                Step::Token(kind) => {
                    self.at += 1;
                    kind
                }
                Step::More => {
                    self.at += 1;
                    if self.lexer.text().len() > self.parser.room() {
                        self.lexer.reset();
                        return Some(Err(self.parser.fail(SyntaxError::Size)));
                    }
                    continue;
                }
            };
            let outcome = self.parser.token(kind, self.lexer.text());
            if outcome.is_some() {
                return outcome;
            }
        }
        None
    }

    /// Nothing more will come: what its end completes or cuts off. To be called when [`Reader::next`] has no more.
    pub fn finish(&mut self) -> Option<Result<Value, SyntaxError>> {
        if let Some(kind) = self.lexer.finish() {
            let outcome = self.parser.token(kind, self.lexer.text());
            if outcome.is_some() {
                return outcome;
            }
        }
        self.parser.finish().map(Err)
    }
}

/// Reads a text that must be one value.
pub fn from_text(text: &str) -> Result<Value, SyntaxError> {
    let mut reader = Reader::new();
    reader.push(text.as_bytes());
    let value = reader.next().or_else(|| reader.finish()).unwrap_or(Err(SyntaxError::Empty))?;
    match reader.next().or_else(|| reader.finish()) {
        None => Ok(value),
        Some(_) => Err(SyntaxError::Several),
    }
}

#[cfg(test)]
mod tests;
