//! The client's side of negotiation: choose one export.

use super::{
    BlockSizes, EXPORT_NAME_PADDING, GREETING_LEN, Greeting, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT,
    INFO_NAME, MAX_STRING, MetaContext, OptionCode, OptionReply, REP_ACK, REP_INFO, REP_META_CONTEXT, Step,
    encode_option, put_string, unexpected,
};
use crate::error::{OptionRefusal, ProtocolError, printable};
use crate::flags::TransmissionFlags;
use crate::wire::Reader;

/// Most informational replies that are taken from a server for one option; more is an attempt to keep us busy.
const MAX_REPLIES: u32 = 256;

/// What a client wants of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientAsk {
    /// The export's name, at most [`MAX_STRING`] bytes; empty for the default export.
    pub export: String,
    /// Whether to ask for structured replies. Without them there is no block status and no hole in a read.
    pub structured: bool,
    /// Contexts to ask for, such as [`BASE_ALLOCATION`](super::BASE_ALLOCATION). Ignored without structured replies.
    pub contexts: Vec<String>,
}

impl ClientAsk {
    /// Asks for everything that helps to copy an image: structured replies and `base:allocation`.
    pub fn new(export: impl Into<String>) -> Self {
        let contexts = vec![super::BASE_ALLOCATION.to_owned()];
        Self { export: export.into(), structured: true, contexts }
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
    /// Whether replies may be structured; also the argument of [`ReplyHeader::decode`](crate::ReplyHeader::decode).
    pub structured: bool,
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
    StructuredReply,
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
    structured: bool,
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
            structured: false,
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
            Stage::StructuredReply => self.structured_reply(input, output),
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
        if self.ask.structured {
            encode_option(output, OptionCode::StructuredReply, &[]);
            self.stage = Stage::StructuredReply;
        } else {
            self.send_go(output);
        }
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

    fn structured_reply(mut self, input: &[u8], output: &mut Vec<u8>) -> Result<ClientStep, ProtocolError> {
        let option = OptionCode::StructuredReply;
        let consumed = match OptionReply::decode(input, option)? {
            OptionReply::Incomplete(needed) => return Ok(Step::More { state: self, needed }),
            OptionReply::Reply { kind: REP_ACK, consumed, .. } => {
                self.structured = true;
                consumed
            }
            OptionReply::Reply { kind, .. } => return Err(unexpected(option, kind)),
            OptionReply::Refused { refusal: OptionRefusal::TlsRequired, message, .. } => {
                return Err(self.refused(option, OptionRefusal::TlsRequired, message));
            }
            OptionReply::Refused { consumed, .. } => consumed,
        };
        if self.structured && !self.ask.contexts.is_empty() {
            self.send_meta_context(output);
        } else {
            self.send_go(output);
        }
        Ok(Step::Next { state: self, consumed })
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
            OptionReply::Refused { refusal: OptionRefusal::Unsupported, consumed, .. } => {
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
            structured: self.structured,
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
