//! Tokens to values.
//!
//! A value under construction is a stack of open arrays and objects, so that deep nesting costs memory and no stack. An
//! error is kept until the brackets balance, and then reported once for the whole value: what follows it is read
//! as the next one. Brackets of the two kinds are counted apart, and closing one that isn't open ends the value as well.

use serde_json::{Map, Number, Value};

use super::lexer::Kind;
use super::text::unquote;
use super::{MAX_MESSAGE, MAX_NESTING, MAX_TOKENS, SyntaxError};

#[derive(Debug)]
enum Frame {
    Array { items: Vec<Value>, expect: Expect },
    Object { members: Map<String, Value>, expect: Expect, key: Option<String> },
}

/// What an open array or object wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// An item or member, or the closing bracket, as nothing was there yet.
    FirstOrEnd,
    /// An item or a member's key.
    Item,
    Colon,
    /// A member's value.
    MemberValue,
    SeparatorOrEnd,
}

#[derive(Debug, Default)]
pub(super) struct Parser {
    stack: Vec<Frame>,
    braces: i32,
    brackets: i32,
    tokens: usize,
    bytes: usize,
    error: Option<SyntaxError>,
    value: Option<Value>,
}

impl Parser {
    /// How much longer the message may become.
    pub(super) fn room(&self) -> usize {
        MAX_MESSAGE.saturating_sub(self.bytes)
    }

    /// Gives up the value under construction for `error`.
    pub(super) fn fail(&mut self, error: SyntaxError) -> SyntaxError {
        *self = Self::default();
        error
    }

    /// Nothing more will come: what is wrong with a value that was begun and isn't complete.
    pub(super) fn finish(&mut self) -> Option<SyntaxError> {
        let begun = std::mem::take(self);
        (begun.tokens > 0).then(|| begun.error.unwrap_or_else(SyntaxError::premature_end))
    }

    /// Takes a token; returns what it completed.
    pub(super) fn token(&mut self, kind: Kind, text: &[u8]) -> Option<Result<Value, SyntaxError>> {
        match kind {
            Kind::Stray => return Some(Err(self.fail(SyntaxError::stray(text)))),
            Kind::Punctuation(b'{') => self.braces += 1,
            Kind::Punctuation(b'}') => self.braces -= 1,
            Kind::Punctuation(b'[') => self.brackets += 1,
            Kind::Punctuation(b']') => self.brackets -= 1,
            _ => {}
        }
        self.tokens += 1;
        self.bytes += text.len();
        // The counts are below the limit of tokens, so the sum doesn't overflow.
        if self.braces + self.brackets > MAX_NESTING {
            return Some(Err(self.fail(SyntaxError::Nesting)));
        }
        if self.tokens > MAX_TOKENS {
            return Some(Err(self.fail(SyntaxError::Tokens)));
        }
        if self.bytes > MAX_MESSAGE {
            return Some(Err(self.fail(SyntaxError::Size)));
        }
        if self.error.is_none() {
            self.error = self.accept(kind, text).err();
        }
        let open = self.braces > 0 || self.brackets > 0;
        if open && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        let done = std::mem::take(self);
        Some(match (done.error, done.value) {
            (None, Some(value)) => Ok(value),
            (Some(error), _) => Err(error),
            (None, None) => Err(SyntaxError::premature_end()),
        })
    }

    fn accept(&mut self, kind: Kind, text: &[u8]) -> Result<(), SyntaxError> {
        match self.stack.last_mut() {
            None => self.begin(kind, text),
            Some(Frame::Array { expect, .. }) => match (*expect, kind) {
                (Expect::FirstOrEnd | Expect::SeparatorOrEnd, Kind::Punctuation(b']')) => self.close(),
                (Expect::SeparatorOrEnd, Kind::Punctuation(b',')) => {
                    *expect = Expect::Item;
                    Ok(())
                }
                (Expect::SeparatorOrEnd, _) => Err(SyntaxError::parse("expected separator in list")),
                _ => self.begin(kind, text),
            },
            Some(Frame::Object { expect, .. }) => match (*expect, kind) {
                (Expect::FirstOrEnd | Expect::SeparatorOrEnd, Kind::Punctuation(b'}')) => self.close(),
                (Expect::SeparatorOrEnd, Kind::Punctuation(b',')) => {
                    *expect = Expect::Item;
                    Ok(())
                }
                (Expect::SeparatorOrEnd, _) => Err(SyntaxError::parse("expected separator in dict")),
                (Expect::Colon, Kind::Punctuation(b':')) => {
                    *expect = Expect::MemberValue;
                    Ok(())
                }
                (Expect::Colon, _) => Err(SyntaxError::parse("missing : in object pair")),
                // A key is read like any value, and found to be none when it is complete.
                _ => self.begin(kind, text),
            },
        }
    }

    /// A value begins here.
    fn begin(&mut self, kind: Kind, text: &[u8]) -> Result<(), SyntaxError> {
        let value = match kind {
            Kind::Punctuation(b'{') => {
                let members = Map::new();
                self.stack.push(Frame::Object { members, expect: Expect::FirstOrEnd, key: None });
                return Ok(());
            }
            Kind::Punctuation(b'[') => {
                self.stack.push(Frame::Array { items: Vec::new(), expect: Expect::FirstOrEnd });
                return Ok(());
            }
            Kind::Punctuation(_) | Kind::Stray => return Err(SyntaxError::parse("expecting value")),
            Kind::String => Value::String(unquote(text)?),
            Kind::Integer | Kind::Float => number(text)?,
            Kind::Keyword => match text {
                b"true" => Value::Bool(true),
                b"false" => Value::Bool(false),
                b"null" => Value::Null,
                _ => {
                    let word = String::from_utf8_lossy(text);
                    return Err(SyntaxError::parse(format!("invalid keyword '{word}'")));
                }
            },
        };
        self.end(value)
    }

    fn close(&mut self) -> Result<(), SyntaxError> {
        match self.stack.pop() {
            Some(Frame::Array { items, .. }) => self.end(Value::Array(items)),
            Some(Frame::Object { members, .. }) => self.end(Value::Object(members)),
            None => Err(SyntaxError::parse("expecting value")),
        }
    }

    /// A value is complete, and goes where it was expected.
    fn end(&mut self, value: Value) -> Result<(), SyntaxError> {
        match self.stack.last_mut() {
            None => self.value = Some(value),
            Some(Frame::Array { items, expect }) => {
                items.push(value);
                *expect = Expect::SeparatorOrEnd;
            }
            Some(Frame::Object { members, expect, key }) => match key.take() {
                Some(key) => {
                    if members.contains_key(&key) {
                        return Err(SyntaxError::parse("duplicate key"));
                    }
                    members.insert(key, value);
                    *expect = Expect::SeparatorOrEnd;
                }
                None => {
                    let Value::String(name) = value else {
                        return Err(SyntaxError::parse("key is not a string in object"));
                    };
                    *key = Some(name);
                    *expect = Expect::Colon;
                }
            },
        }
        Ok(())
    }
}

/// An integer where it fits 64 bits, else the nearest double.
fn number(text: &[u8]) -> Result<Value, SyntaxError> {
    let text = String::from_utf8_lossy(text);
    if let Ok(integer) = text.parse::<i64>() {
        return Ok(integer.into());
    }
    if let Ok(integer) = text.parse::<u64>() {
        return Ok(integer.into());
    }
    let double = text.parse().ok().and_then(Number::from_f64);
    double.map(Value::Number).ok_or_else(|| SyntaxError::parse("number out of range"))
}
