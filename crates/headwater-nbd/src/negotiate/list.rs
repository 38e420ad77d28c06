//! The client's side of `NBD_OPT_LIST`: which exports a server has.

use super::{GREETING_LEN, Greeting, MAX_STRING, OptionCode, OptionReply, REP_ACK, REP_SERVER, Step};
use super::{encode_abort, encode_option, unexpected};
use crate::error::{ProtocolError, printable};
use crate::wire::Reader;

/// Most exports that are listed; a server that names more is refused.
const MAX_EXPORTS: usize = 4096;

/// One export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// What to ask for.
    pub name: String,
    /// A text for people; may be empty. Control characters are replaced.
    pub description: String,
}

/// A client that asks for the list of exports and leaves. See the [module](super) for how to drive it.
#[derive(Debug, Default)]
pub struct ListHandshake {
    greeted: bool,
    exports: Vec<ListedExport>,
}

impl ListHandshake {
    /// A client that waits for the server's greeting.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes at most one message from the front of `input` and appends what is to be sent to `output`. When it is
    /// done, send the output and close.
    ///
    /// # Errors
    /// [`ProtocolError`]: the server speaks no NBD, or does not list its exports.
    pub fn step(
        mut self,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Step<Self, Vec<ListedExport>>, ProtocolError> {
        let option = OptionCode::List;
        if !self.greeted {
            let Some(greeting) = Greeting::decode(input)? else {
                return Ok(Step::More { state: self, needed: GREETING_LEN });
            };
            if !greeting.fixed {
                let why = "the server lacks fixed newstyle negotiation and cannot list its exports";
                return Err(ProtocolError::malformed("the greeting", why));
            }
            greeting.answer(output);
            encode_option(output, option, &[]);
            self.greeted = true;
            return Ok(Step::Next { state: self, consumed: GREETING_LEN });
        }
        match OptionReply::decode(input, option)? {
            OptionReply::Incomplete(needed) => Ok(Step::More { state: self, needed }),
            OptionReply::Reply { kind: REP_SERVER, data, consumed } => {
                let mut reader = Reader::new(data);
                let Some(name) = reader.string(MAX_STRING) else {
                    return Err(ProtocolError::malformed("an entry of the list of exports", "bad name"));
                };
                if self.exports.len() >= MAX_EXPORTS {
                    let (length, limit) = (self.exports.len() as u64 + 1, MAX_EXPORTS as u64);
                    return Err(ProtocolError::TooLong { what: "the list of exports", length, limit });
                }
                let (name, description) = (name.to_owned(), printable(reader.rest()));
                self.exports.push(ListedExport { name, description });
                Ok(Step::Next { state: self, consumed })
            }
            OptionReply::Reply { kind: REP_ACK, consumed, .. } => {
                encode_abort(output);
                Ok(Step::Done { outcome: self.exports, consumed })
            }
            OptionReply::Reply { kind, .. } => Err(unexpected(option, kind)),
            OptionReply::Refused { refusal, message, .. } => {
                Err(ProtocolError::Refused { option, export: String::new(), refusal, message })
            }
        }
    }

    /// The error for a connection that ended before negotiation did.
    pub fn closed(&self) -> ProtocolError {
        ProtocolError::Closed { during: "while the list of exports was asked for".to_owned() }
    }
}
