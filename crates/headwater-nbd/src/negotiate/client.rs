//! The client's side of negotiation: choose one export.

use super::{
    BlockSizes, EXPORT_NAME_PADDING, GREETING_LEN, Greeting, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT,
    INFO_NAME, MAX_STRING, MetaContext, OptionCode, OptionReply, REP_ACK, REP_INFO, REP_META_CONTEXT, Step,
    encode_option, put_string, unexpected,
};
use crate::error::{OptionRefusal, ProtocolError, printable};
use crate::flags::TransmissionFlags;
use crate::headers::Headers;
use crate::wire::Reader;

/// Most informational replies that are taken from a server for one option; more is an attempt to keep us busy.
const MAX_REPLIES: u32 = 256;

/// What a client wants of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientAsk {
    /// The export's name, at most [`MAX_STRING`] bytes; empty for the default export.
    pub export: String,
    /// The best headers to ask for; a server that doesn't have them is asked for the next best. Without structured replies there is no
    /// block status and no hole in a read.
    pub headers: Headers,
    /// Contexts to ask for, such as [`BASE_ALLOCATION`](super::BASE_ALLOCATION). Ignored without structured replies.
    pub contexts: Vec<String>,
}

impl ClientAsk {
    /// Asks for everything that helps to copy an image: extended headers, or at least structured replies, and `base:allocation`.
    pub fn new(export: impl Into<String>) -> Self {
        let contexts = vec![super::BASE_ALLOCATION.to_owned()];
        Self { export: export.into(), headers: Headers::Extended, contexts }
    }
}

/// What a server agreed to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOffer {
    /// Size of the export in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Limits on requests; [`BlockSizes::UNKNOWN`] when the server did not tell. Always valid.
    pub block_sizes: BlockSizes,
    /// What headers requests must have, and replies have; also an argument of [`ReplyHeader::decode`](crate::ReplyHeader::decode).
    pub headers: Headers,
    /// Those of the contexts asked for that the server has.
    pub contexts: Vec<MetaContext>,
    /// The export's canonical name, if the server told.
    pub name: Option<String>,
    /// A text for people, if the server told. Control characters are replaced.
    pub description: Option<String>,
}

impl ServerOffer {
    /// The id of a context, if it was agreed on.
    pub fn context(&self, name: &str) -> Option<u32> {
        self.contexts.iter().find(|context| context.name == name).map(|context| context.id)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Greeting,
    /// The server was greeted before TLS; over TLS, the client speaks first.
    Greeted,
    /// These headers were asked for.
    Headers(Headers),
    SetMetaContext,
    Go,
    ExportName,
}

/// A client that is negotiating. See the [module](super) for how to drive it.
#[derive(Debug)]
pub struct ClientHandshake {
    ask: ClientAsk,
    stage: Stage,
    no_zeroes: bool,
    headers: Headers,
    contexts: Vec<MetaContext>,
    /// Size and flags, once told.
    export: Option<(u64, TransmissionFlags)>,
    block_sizes: BlockSizes,
    name: Option<String>,
    description: Option<String>,
    /// Replies seen for the option that is being answered.
    replies: u32,
}

type ClientStep = Step<ClientHandshake, ServerOffer>;

impl ClientHandshake {
    /// A client that waits for the server's greeting.
    pub fn new(ask: ClientAsk) -> Self {
        Self::at(Stage::Greeting, ask, false)
    }

    /// A client that has TLS now, and the greeting behind it.
    pub(super) fn greeted(ask: ClientAsk, no_zeroes: bool) -> Self {
        Self::at(Stage::Greeted, ask, no_zeroes)
    }

    fn at(stage: Stage, ask: ClientAsk, no_zeroes: bool) -> Self {
        Self {
            ask,
            stage,
            no_zeroes,
            headers: Headers::Simple,
            contexts: Vec::new(),
            export: None,
            block_sizes: BlockSizes::UNKNOWN,
            name: None,
            description: None,
            replies: 0,
        }
    }

    /// Takes at most one message from the front of `input` and appends what is to be sent to `output`.
    ///
    /// # Errors
    /// [`ProtocolError`]: the server is not to be talked to, or does not have what was asked for. Close the
    /// connection, after [`encode_abort`](super::encode_abort) if the error is [`ProtocolError::Refused`].
    pub fn step(self, input: &[u8], output: &mut Vec<u8>) -> Result<ClientStep, ProtocolError> {
        match self.stage {
            Stage::Greeting => self.greeting(input, output),
            Stage::Greeted => self.first_option(0, output),
            Stage::Headers(asked) => self.headers(asked, input, output),
            Stage::SetMetaContext => self.meta_context(input, output),
            Stage::Go => self.go(input, output),
            Stage::ExportName => self.export_name(input),
        }
    }

    /// The error for a connection that ended before negotiation did.
    pub fn closed(&self) -> ProtocolError {
        let during = match self.stage {
            Stage::Greeting => "before the server's greeting".to_owned(),
            // The only way for a server to refuse here is to close.
            Stage::ExportName => {
                format!("when export {:?} was asked for; the server may not have it", self.ask.export)
            }
            _ => "during negotiation".to_owned(),
        };
        ProtocolError::Closed { during }
    }

    fn greeting(mut self, input: &[u8], output: &mut Vec<u8>) -> Result<ClientStep, ProtocolError> {
        let Some(greeting) = Greeting::decode(input)? else {
            return Ok(Step::More { state: self, needed: GREETING_LEN });
        };
        greeting.answer(output);
        self.no_zeroes = greeting.no_zeroes;
        if !greeting.fixed {
            self.check_names()?;
            // Such a server knows a single option.
            self.send_export_name(output);
            return Ok(Step::Next { state: self, consumed: GREETING_LEN });
        }
        self.first_option(GREETING_LEN, output)
    }

    fn first_option(mut self, consumed: usize, output: &mut Vec<u8>) -> Result<ClientStep, ProtocolError> {
        self.check_names()?;
        self.ask_for_headers(self.ask.headers, output);
        Ok(Step::Next { state: self, consumed })
    }

    /// What is asked for must fit an option.
    fn check_names(&self) -> Result<(), ProtocolError> {
        for name in self.ask.contexts.iter().chain([&self.ask.export]) {
            if name.len() > MAX_STRING {
                let (length, limit) = (name.len() as u64, MAX_STRING as u64);
                return Err(ProtocolError::TooLong { what: "a name to ask for", length, limit });
            }
        }
        Ok(())
    }

    fn ask_for_headers(&mut self, headers: Headers, output: &mut Vec<u8>) {
        match headers_option(headers) {
            Some(option) => {
                encode_option(output, option, &[]);
                self.stage = Stage::Headers(headers);
            }
            None => self.headers_are_known(output),
        }
    }

    fn headers(
        mut self,
        asked: Headers,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<ClientStep, ProtocolError> {
        let option = headers_option(asked).unwrap_or(OptionCode::StructuredReply);
        let consumed = match OptionReply::decode(input, option)? {
            OptionReply::Incomplete(needed) => return Ok(Step::More { state: self, needed }),
            OptionReply::Reply { kind: REP_ACK, consumed, .. } => {
                self.headers = asked;
                self.headers_are_known(output);
                consumed
            }
            OptionReply::Reply { kind, .. } => return Err(unexpected(option, kind)),
            OptionReply::Refused { refusal: OptionRefusal::TlsRequired, message, .. } => {
                return Err(self.refused(option, OptionRefusal::TlsRequired, message));
            }
            OptionReply::Refused { consumed, .. } => {
                let next = if asked.are_extended() { Headers::Structured } else { Headers::Simple };
                self.ask_for_headers(next, output);
                consumed
            }
        };
        Ok(Step::Next { state: self, consumed })
    }

    fn headers_are_known(&mut self, output: &mut Vec<u8>) {
        if self.headers.are_structured() && !self.ask.contexts.is_empty() {
            self.send_meta_context(output);
        } else {
            self.send_go(output);
        }
    }

    fn meta_context(mut self, input: &[u8], output: &mut Vec<u8>) -> Result<ClientStep, ProtocolError> {
        let option = OptionCode::SetMetaContext;
        let consumed = match OptionReply::decode(input, option)? {
            OptionReply::Incomplete(needed) => return Ok(Step::More { state: self, needed }),
            OptionReply::Reply { kind: REP_META_CONTEXT, data, consumed } => {
                self.count_reply()?;
                let mut reader = Reader::new(data);
                let id = reader.u32();
                let name = std::str::from_utf8(reader.rest()).ok().filter(|name| name.len() <= MAX_STRING);
                let (Some(id), Some(name)) = (id, name) else {
                    return Err(ProtocolError::malformed("a meta context", "no id, or a bad name"));
                };
                // Names that were not asked for can't be of use.
                if self.ask.contexts.iter().any(|asked| asked == name) {
                    self.contexts.retain(|known| known.name != name);
                    self.contexts.push(MetaContext { id, name: name.to_owned() });
                }
                return Ok(Step::Next { state: self, consumed });
            }
            OptionReply::Reply { kind: REP_ACK, consumed, .. } => consumed,
            OptionReply::Reply { kind, .. } => return Err(unexpected(option, kind)),
            // Block status is a help, not a need; `Go` will tell what is really wrong.
            OptionReply::Refused { consumed, .. } => {
                self.contexts.clear();
                consumed
            }
        };
        self.send_go(output);
        Ok(Step::Next { state: self, consumed })
    }

    fn go(mut self, input: &[u8], output: &mut Vec<u8>) -> Result<ClientStep, ProtocolError> {
        let option = OptionCode::Go;
        match OptionReply::decode(input, option)? {
            OptionReply::Incomplete(needed) => Ok(Step::More { state: self, needed }),
            OptionReply::Reply { kind: REP_INFO, data, consumed } => {
                self.count_reply()?;
                self.info(data)?;
                Ok(Step::Next { state: self, consumed })
            }
            OptionReply::Reply { kind: REP_ACK, consumed, .. } => self.done(consumed),
            OptionReply::Reply { kind, .. } => Err(unexpected(option, kind)),
            // Who has extended headers has `GO`.
            OptionReply::Refused { refusal: OptionRefusal::Unsupported, consumed, .. }
                if !self.headers.are_extended() =>
            {
                self.send_export_name(output);
                Ok(Step::Next { state: self, consumed })
            }
            OptionReply::Refused { refusal, message, .. } => Err(self.refused(option, refusal, message)),
        }
    }

    /// One piece of information about the export. Unknown kinds are skipped, as the protocol demands.
    fn info(&mut self, data: &[u8]) -> Result<(), ProtocolError> {
        const WHAT: &str = "information about the export";
        let mut reader = Reader::new(data);
        let kind = reader.u16().ok_or_else(|| ProtocolError::malformed(WHAT, "no type"))?;
        match kind {
            INFO_EXPORT => match (reader.u64(), reader.u16()) {
                (Some(size), Some(flags)) if reader.is_empty() => {
                    self.export = Some((size, TransmissionFlags::from_bits(flags)));
                }
                _ => return Err(ProtocolError::malformed(WHAT, "size and flags are not ten bytes")),
            },
            INFO_BLOCK_SIZE => {
                let fields = (reader.u32(), reader.u32(), reader.u32());
                let (Some(minimum), Some(preferred), Some(maximum)) = fields else {
                    return Err(ProtocolError::malformed(WHAT, "block sizes are not twelve bytes"));
                };
                let sizes = BlockSizes { minimum, preferred, maximum };
                if !sizes.is_valid() {
                    return Err(ProtocolError::malformed(WHAT, format!("impossible {sizes:?}")));
                }
                self.block_sizes = sizes;
            }
            INFO_NAME => self.name = Some(printable(reader.rest())),
            INFO_DESCRIPTION => self.description = Some(printable(reader.rest())),
            _ => {}
        }
        Ok(())
    }

    fn export_name(mut self, input: &[u8]) -> Result<ClientStep, ProtocolError> {
        let padding = if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        let needed = 10 + padding;
        let mut reader = Reader::new(input);
        let (Some(size), Some(flags), Some(_)) = (reader.u64(), reader.u16(), reader.bytes(padding)) else {
            return Ok(Step::More { state: self, needed });
        };
        self.export = Some((size, TransmissionFlags::from_bits(flags)));
        self.done(needed)
    }

    fn done(self, consumed: usize) -> Result<ClientStep, ProtocolError> {
        let Some((size, flags)) = self.export else {
            return Err(ProtocolError::malformed("the reply to NBD_OPT_GO", "size and flags are missing"));
        };
        let outcome = ServerOffer {
            size,
            flags,
            block_sizes: self.block_sizes,
            headers: self.headers,
            contexts: self.contexts,
            name: self.name,
            description: self.description,
        };
        Ok(Step::Done { outcome, consumed })
    }

    fn send_meta_context(&mut self, output: &mut Vec<u8>) {
        let mut data = Vec::new();
        put_string(&mut data, &self.ask.export);
        data.extend_from_slice(&(self.ask.contexts.len() as u32).to_be_bytes());
        for name in &self.ask.contexts {
            put_string(&mut data, name);
        }
        encode_option(output, OptionCode::SetMetaContext, &data);
        self.stage = Stage::SetMetaContext;
        self.replies = 0;
    }

    fn send_go(&mut self, output: &mut Vec<u8>) {
        let wanted = [INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE];
        let mut data = Vec::new();
        put_string(&mut data, &self.ask.export);
        data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
        for kind in wanted {
            data.extend_from_slice(&kind.to_be_bytes());
        }
        encode_option(output, OptionCode::Go, &data);
        self.stage = Stage::Go;
        self.replies = 0;
    }

    fn send_export_name(&mut self, output: &mut Vec<u8>) {
        encode_option(output, OptionCode::ExportName, self.ask.export.as_bytes());
        self.stage = Stage::ExportName;
    }

    fn count_reply(&mut self) -> Result<(), ProtocolError> {
        self.replies += 1;
        if self.replies > MAX_REPLIES {
            let (length, limit) = (self.replies.into(), MAX_REPLIES.into());
            return Err(ProtocolError::TooLong { what: "a list of replies to one option", length, limit });
        }
        Ok(())
    }

    fn refused(&self, option: OptionCode, refusal: OptionRefusal, message: String) -> ProtocolError {
        ProtocolError::Refused { option, export: self.ask.export.clone(), refusal, message }
    }
}

/// The option that asks for headers; none for those that need not be asked for.
fn headers_option(headers: Headers) -> Option<OptionCode> {
    match headers {
        Headers::Simple => None,
        Headers::Structured => Some(OptionCode::StructuredReply),
        Headers::Extended => Some(OptionCode::ExtendedHeaders),
    }
}
