//! Bytes to tokens, one byte at a time.
//!
//! The lexer knows nothing of nesting. After a byte that no token can contain it skips what follows until a bracket, a
//! comma, a colon or the end of the line, because anything before that is most likely the rest of the same mistake.

/// What a token is. Its text is the lexer's until the next byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// One of `{}[]:,`.
    Punctuation(u8),
    /// With its quotes, escapes untouched.
    String,
    Integer,
    Float,
    /// Lower-case letters.
    Keyword,
    /// Bytes that begin no token, or not this way.
    Stray,
}

/// What a byte did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It was taken, and no token is complete.
    More,
    /// It was taken and completed a token.
    Token(Kind),
    /// It ended a token that it is no part of, and must be offered again.
    TokenBefore(Kind),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    Recovery,
    Keyword,
    String { quote: u8 },
    Escape { quote: u8 },
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// What a state makes of a byte.
enum Action {
    Go(State),
    End(Kind),
    EndBefore(Kind),
    Skip(State),
}

#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    text: Vec<u8>,
    /// Whether `text` belongs to a token that is complete.
    complete: bool,
}

impl Lexer {
    pub(super) fn new() -> Self {
        Self { state: State::Start, text: Vec::new(), complete: false }
    }

    /// The text of the token that is being read, or that the last step completed.
    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }

    /// Forgets a token that is being read.
    pub(super) fn reset(&mut self) {
        self.state = State::Start;
        self.text.clear();
    }

    pub(super) fn step(&mut self, byte: u8) -> Step {
        if std::mem::take(&mut self.complete) {
            self.text.clear();
        }
        match self.state.action(byte) {
            Action::Go(state) => {
                self.text.push(byte);
                self.state = state;
                Step::More
            }
            Action::Skip(state) => {
                self.state = state;
                Step::More
            }
            Action::End(kind) => {
                self.text.push(byte);
                self.end(kind);
                Step::Token(kind)
            }
            Action::EndBefore(kind) => {
                self.end(kind);
                Step::TokenBefore(kind)
            }
        }
    }

    /// The input is over: the token that this completes, if one was being read.
    pub(super) fn finish(&mut self) -> Option<Kind> {
        if std::mem::take(&mut self.complete) {
            self.text.clear();
        }
        // White space ends each token that may end here at all.
        let kind = match self.state {
            State::Start | State::Recovery => return None,
            State::String { .. } | State::Escape { .. } => Kind::Stray,
            state => match state.action(b' ') {
                Action::EndBefore(kind) => kind,
                _ => Kind::Stray,
            },
        };
        self.end(kind);
        self.state = State::Start;
        Some(kind)
    }

    fn end(&mut self, kind: Kind) {
        self.complete = true;
        self.state = if kind == Kind::Stray { State::Recovery } else { State::Start };
    }
}

impl State {
    fn action(self, byte: u8) -> Action {
        use Action::{End, EndBefore, Go, Skip};
        match (self, byte) {
            (Self::Start, b' ' | b'\t' | b'\r' | b'\n') => Skip(Self::Start),
            (Self::Start | Self::Recovery, b'{' | b'}' | b'[' | b']' | b':' | b',') => {
                End(Kind::Punctuation(byte))
            }
            (Self::Start, b'"' | b'\'') => Go(Self::String { quote: byte }),
            (Self::Start, b'-') => Go(Self::Minus),
            (Self::Start | Self::Minus, b'0') => Go(Self::Zero),
            (Self::Start | Self::Minus, b'1'..=b'9') => Go(Self::Digits),
            (Self::Start | Self::Keyword, b'a'..=b'z') => Go(Self::Keyword),
            (Self::Keyword, _) => EndBefore(Kind::Keyword),

            (Self::Recovery, b'\r' | b'\n') => Skip(Self::Start),
            (Self::Recovery, b'\t' | b' '..=0xfd) => Skip(Self::Recovery),

            (Self::String { quote }, b'\\') => Go(Self::Escape { quote }),
            (Self::String { quote }, _) if byte == quote => End(Kind::String),
            (Self::String { quote } | Self::Escape { quote }, b' '..=0xfd) => Go(Self::String { quote }),

            (Self::Zero | Self::Digits, b'.') => Go(Self::Point),
            (Self::Digits | Self::Fraction, b'e' | b'E') => Go(Self::Exponent),
            (Self::Digits, b'0'..=b'9') => Go(Self::Digits),
            (Self::Zero, b'0'..=b'9') => End(Kind::Stray),
            (Self::Zero | Self::Digits, _) => EndBefore(Kind::Integer),
            (Self::Point | Self::Fraction, b'0'..=b'9') => Go(Self::Fraction),
            (Self::Exponent, b'+' | b'-') => Go(Self::ExponentSign),
            (Self::Exponent | Self::ExponentSign | Self::ExponentDigits, b'0'..=b'9') => {
                Go(Self::ExponentDigits)
            }
            (Self::Fraction | Self::ExponentDigits, _) => EndBefore(Kind::Float),

            _ => End(Kind::Stray),
        }
    }
}
