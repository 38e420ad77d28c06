//! The client's side of `NBD_OPT_STARTTLS`: what is said in clear before TLS, and nothing else.

use super::{ClientAsk, ClientHandshake, GREETING_LEN, Greeting, OptionCode, OptionReply, REP_ACK, Step};
use super::{encode_option, unexpected};
use crate::error::ProtocolError;

/// A client that will not go on without TLS. When it is done, start TLS and drive over it what it leads to: nothing that was said in
/// clear counts there but the greeting. See the [module](super) for how to drive it.
#[derive(Debug)]
pub struct TlsHandshake {
    ask: ClientAsk,
    /// The greeting's "no zeroes", once it was heard.
    greeted: Option<bool>,
}

impl TlsHandshake {
    /// A client that waits for the server's greeting, and will ask `ask` over TLS.
    pub fn new(ask: ClientAsk) -> Self {
        Self { ask, greeted: None }
    }

    /// Takes at most one message from the front of `input` and appends what is to be sent to `output`. When it is done, nothing of the
    /// input may be left: it would have come in clear.
    ///
    /// # Errors
    /// [`ProtocolError`]: the server speaks no NBD, or no TLS.
    pub fn step(
        mut self,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<Step<Self, ClientHandshake>, ProtocolError> {
        let option = OptionCode::StartTls;
        let Some(no_zeroes) = self.greeted else {
            let Some(greeting) = Greeting::decode(input)? else {
                return Ok(Step::More { state: self, needed: GREETING_LEN });
            };
            if !greeting.fixed {
                let why = "the server lacks fixed newstyle negotiation and cannot start TLS";
                return Err(ProtocolError::malformed("the greeting", why));
            }
            greeting.answer(output);
            encode_option(output, option, &[]);
            self.greeted = Some(greeting.no_zeroes);
            return Ok(Step::Next { state: self, consumed: GREETING_LEN });
        };
        match OptionReply::decode(input, option)? {
            OptionReply::Incomplete(needed) => Ok(Step::More { state: self, needed }),
            OptionReply::Reply { kind: REP_ACK, consumed, .. } => {
                Ok(Step::Done { outcome: ClientHandshake::greeted(self.ask, no_zeroes), consumed })
            }
            OptionReply::Reply { kind, .. } => Err(unexpected(option, kind)),
            OptionReply::Refused { refusal, message, .. } => {
                Err(ProtocolError::Refused { option, export: self.ask.export, refusal, message })
            }
        }
    }

    /// The error for a connection that ended before TLS was agreed on.
    pub fn closed(&self) -> ProtocolError {
        let during = match self.greeted {
            None => "before the server's greeting",
            Some(_) => "when TLS was asked for",
        };
        ProtocolError::Closed { during: during.to_owned() }
    }
}
