//! The server's side of negotiation.
//!
//! A client can keep a server busy here before it is known to be worth anything, so everything is bounded: the data
//! of an option that are buffered, those that are skipped, and the number of options.

use super::{
    BlockSizes, EXPORT_NAME_PADDING, FIXED_NEWSTYLE, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT,
    INFO_NAME, MAX_OPTION, MAX_STRING, MetaContext, NO_ZEROES, OPTION_LEN, OptionCode, REP_ACK, REP_INFO,
    REP_META_CONTEXT, REP_SERVER, Step, put_string,
};
use crate::error::{OptionRefusal, ProtocolError};
use crate::flags::TransmissionFlags;
use crate::wire::{self, Reader};

/// Longest data of an option that are skipped to keep an honest client of a newer protocol; beyond it the client is cut off.
const MAX_SKIPPED: u32 = 32 << 20;

/// Most options of one client. An honest one sends five or so, a lister a few for each export.
const MAX_OPTIONS: u32 = 4096;

/// One export as clients see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name, at most [`MAX_STRING`] bytes. A client that asks for the empty name gets the export of that name, or
    /// else the only export.
    pub name: String,
    /// A text for people, at most [`MAX_STRING`] bytes; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// What it can do. [`TransmissionFlags::SEND_DF`] is withheld from clients without structured replies.
    pub flags: TransmissionFlags,
    /// Limits on requests; must be [valid](BlockSizes::is_valid).
    pub block_sizes: BlockSizes,
    /// Names of the contexts of block status that it has.
    pub contexts: Vec<String>,
}

/// What a client chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientChoice {
    /// Index into the exports that [`ServerHandshake::new`] was given.
    pub export: usize,
    /// The flags that the client was told.
    pub flags: TransmissionFlags,
    /// Whether replies to reads must be structured.
    pub structured: bool,
    /// The contexts that each block status reply must carry. The id is the index in [`ExportInfo::contexts`].
    pub contexts: Vec<MetaContext>,
}

/// How negotiation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerOutcome {
    /// Requests follow.
    Transmission(ClientChoice),
    /// The client left, or asked in a way that has no reply for an export that there is not. Send the output, close.
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    ClientFlags,
    Options,
    /// So many bytes of an option that is refused already are still to come.
    Skipping(u32),
}

/// A server that is negotiating with one client. See the [module](super) for how to drive it.
#[derive(Debug)]
pub struct ServerHandshake {
    exports: Vec<ExportInfo>,
    stage: Stage,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// Contexts chosen, and for which export.
    contexts: Option<(usize, Vec<MetaContext>)>,
    options: u32,
}

type ServerStep = Step<ServerHandshake, ServerOutcome>;

/// Why an option is refused: the reply's type, and words for people.
type Refusal = (OptionRefusal, &'static str);

impl ServerHandshake {
    /// A server with these exports; appends its greeting to `output`.
    pub fn new(exports: Vec<ExportInfo>, output: &mut Vec<u8>) -> Self {
        debug_assert!(exports.iter().all(|export| export.block_sizes.is_valid()));
        output.extend_from_slice(&wire::NBDMAGIC.to_be_bytes());
        output.extend_from_slice(&wire::IHAVEOPT.to_be_bytes());
        output.extend_from_slice(&((FIXED_NEWSTYLE | NO_ZEROES) as u16).to_be_bytes());
        Self {
            exports,
            stage: Stage::ClientFlags,
            fixed: false,
            no_zeroes: false,
            structured: false,
            contexts: None,
            options: 0,
        }
    }

    /// Takes at most one message from the front of `input` and appends what is to be sent to `output`.
    ///
    /// # Errors
    /// [`ProtocolError`]: the client is to be cut off.
    pub fn step(mut self, input: &[u8], output: &mut Vec<u8>) -> Result<ServerStep, ProtocolError> {
        match self.stage {
            Stage::ClientFlags => self.client_flags(input),
            Stage::Options => self.option(input, output),
            Stage::Skipping(remaining) => {
                if input.is_empty() {
                    return Ok(Step::More { state: self, needed: 1 });
                }
                let consumed = input.len().min(remaining as usize);
                self.stage = match remaining - consumed as u32 {
                    0 => Stage::Options,
                    remaining => Stage::Skipping(remaining),
                };
                Ok(Step::Next { state: self, consumed })
            }
        }
    }

    fn client_flags(mut self, input: &[u8]) -> Result<ServerStep, ProtocolError> {
        let Some(flags) = Reader::new(input).u32() else {
            return Ok(Step::More { state: self, needed: 4 });
        };
        if flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(ProtocolError::malformed(
                "the client's greeting",
                format!("unknown flags {flags:#x}"),
            ));
        }
        self.fixed = flags & FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & NO_ZEROES != 0;
        self.stage = Stage::Options;
        Ok(Step::Next { state: self, consumed: 4 })
    }

    fn option(mut self, input: &[u8], output: &mut Vec<u8>) -> Result<ServerStep, ProtocolError> {
        let mut reader = Reader::new(input);
        let Some(magic) = reader.u64() else { return Ok(Step::More { state: self, needed: OPTION_LEN }) };
        if magic != wire::IHAVEOPT {
            let (what, expected) = ("an option", wire::IHAVEOPT);
            return Err(ProtocolError::BadMagic { what, found: magic, expected });
        }
        let (Some(code), Some(length)) = (reader.u32(), reader.u32()) else {
            return Ok(Step::More { state: self, needed: OPTION_LEN });
        };
        let option = OptionCode::from_wire(code);
        if !self.fixed && option != OptionCode::ExportName {
            let why = format!("option {option} from a client without fixed newstyle negotiation");
            return Err(ProtocolError::malformed("an option", why));
        }
        let limit = match option {
            OptionCode::ExportName => MAX_STRING as u32,
            _ => MAX_SKIPPED,
        };
        if length > limit {
            let (length, limit) = (length.into(), limit.into());
            return Err(ProtocolError::TooLong { what: "an option", length, limit });
        }
        let refusal = match option {
            OptionCode::Other(_) => Some((OptionRefusal::Unsupported, "unknown option")),
            _ if length > MAX_OPTION => Some((OptionRefusal::TooBig, "the option's data are too long")),
            _ => None,
        };
        if refusal.is_none() && reader.bytes(length as usize).is_none() {
            return Ok(Step::More { state: self, needed: OPTION_LEN + length as usize });
        }
        self.options += 1;
        if self.options > MAX_OPTIONS {
            let (length, limit) = (self.options.into(), MAX_OPTIONS.into());
            return Err(ProtocolError::TooLong { what: "the haggling", length, limit });
        }
        if let Some((refusal, words)) = refusal {
            put_reply(output, option, refusal.to_wire(), words.as_bytes());
            if length > 0 {
                self.stage = Stage::Skipping(length);
            }
            return Ok(Step::Next { state: self, consumed: OPTION_LEN });
        }
        let consumed = OPTION_LEN + length as usize;
        Ok(match self.answer(option, &input[OPTION_LEN..consumed], output) {
            Some(outcome) => Step::Done { outcome, consumed },
            None => Step::Next { state: self, consumed },
        })
    }

    /// Answers one complete option; `Some` ends negotiation.
    fn answer(&mut self, option: OptionCode, data: &[u8], output: &mut Vec<u8>) -> Option<ServerOutcome> {
        let mut replies = Vec::new();
        let outcome = match option {
            OptionCode::ExportName => return Some(self.export_name(data, output)),
            OptionCode::Abort => Ok(Some(ServerOutcome::Closed)),
            OptionCode::List => self.list(data, &mut replies).map(|()| None),
            OptionCode::StartTls => Err((OptionRefusal::Policy, "TLS is not supported; connect without it")),
            OptionCode::Info => self.info(option, data, &mut replies).map(|_| None),
            OptionCode::Go => {
                self.info(option, data, &mut replies).map(|export| Some(self.transmission(export)))
            }
            OptionCode::StructuredReply => self.structured_reply(data).map(|()| None),
            OptionCode::ListMetaContext => self.list_contexts(data, &mut replies).map(|()| None),
            OptionCode::SetMetaContext => self.set_contexts(data, &mut replies).map(|()| None),
            OptionCode::Other(_) => Err((OptionRefusal::Unsupported, "unknown option")),
        };
        match outcome {
            Ok(outcome) => {
                output.append(&mut replies);
                put_reply(output, option, REP_ACK, &[]);
                outcome
            }
            Err((refusal, words)) => {
                put_reply(output, option, refusal.to_wire(), words.as_bytes());
                None
            }
        }
    }

    fn export_name(&mut self, data: &[u8], output: &mut Vec<u8>) -> ServerOutcome {
        let Some(index) = std::str::from_utf8(data).ok().and_then(|name| self.find(name)) else {
            return ServerOutcome::Closed;
        };
        let padding = if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        output.extend_from_slice(&self.exports[index].size.to_be_bytes());
        output.extend_from_slice(&self.flags(index).bits().to_be_bytes());
        output.resize(output.len() + padding, 0);
        self.transmission(index)
    }

    fn list(&self, data: &[u8], replies: &mut Vec<u8>) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err((OptionRefusal::Invalid, "NBD_OPT_LIST takes no data"));
        }
        for export in &self.exports {
            let mut entry = Vec::new();
            put_string(&mut entry, &export.name);
            entry.extend_from_slice(export.description.as_bytes());
            put_reply(replies, OptionCode::List, REP_SERVER, &entry);
        }
        Ok(())
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err((OptionRefusal::Invalid, "NBD_OPT_STRUCTURED_REPLY takes no data"));
        }
        if self.structured {
            return Err((OptionRefusal::Invalid, "structured replies were negotiated before"));
        }
        self.structured = true;
        Ok(())
    }

    /// Answers `INFO` and `GO`; returns the export.
    fn info(&self, option: OptionCode, data: &[u8], replies: &mut Vec<u8>) -> Result<usize, Refusal> {
        const MALFORMED: Refusal = (OptionRefusal::Invalid, "malformed request for an export");
        let mut reader = Reader::new(data);
        let name = reader.string(MAX_STRING).ok_or(MALFORMED)?;
        let count = reader.u16().ok_or(MALFORMED)?;
        let kinds = reader.rest();
        if kinds.len() != usize::from(count) * 2 {
            return Err(MALFORMED);
        }
        let wants = |kind: u16| kinds.chunks_exact(2).any(|wanted| wanted == kind.to_be_bytes());
        let index = self.find(name).ok_or((OptionRefusal::UnknownExport, "no such export"))?;
        let export = &self.exports[index];
        let BlockSizes { minimum, preferred, maximum } = export.block_sizes;
        if minimum > 1 && !wants(INFO_BLOCK_SIZE) {
            return Err((OptionRefusal::BlockSizeRequired, "ask for the block sizes, and honour them"));
        }

        let mut put = |kind: u16, content: &[u8]| {
            let data = [&kind.to_be_bytes(), content].concat();
            put_reply(replies, option, REP_INFO, &data);
        };
        let size_and_flags =
            [&export.size.to_be_bytes()[..], &self.flags(index).bits().to_be_bytes()].concat();
        put(INFO_EXPORT, &size_and_flags);
        if wants(INFO_NAME) {
            put(INFO_NAME, export.name.as_bytes());
        }
        if wants(INFO_DESCRIPTION) && !export.description.is_empty() {
            put(INFO_DESCRIPTION, export.description.as_bytes());
        }
        if wants(INFO_BLOCK_SIZE) {
            put(INFO_BLOCK_SIZE, &[minimum, preferred, maximum].map(u32::to_be_bytes).concat());
        }
        Ok(index)
    }

    fn list_contexts(&self, data: &[u8], replies: &mut Vec<u8>) -> Result<(), Refusal> {
        let (index, queries) = self.context_queries(data)?;
        for name in &self.exports[index].contexts {
            // A namespace alone, such as "base:", lists all of it; no query at all lists everything.
            let asked = queries.is_empty()
                || queries
                    .iter()
                    .any(|query| query == name || query.ends_with(':') && name.starts_with(query));
            if asked {
                put_context(replies, OptionCode::ListMetaContext, 0, name);
            }
        }
        Ok(())
    }

    fn set_contexts(&mut self, data: &[u8], replies: &mut Vec<u8>) -> Result<(), Refusal> {
        // Whatever was chosen before is void, even if this attempt fails.
        self.contexts = None;
        if !self.structured {
            return Err((OptionRefusal::Invalid, "negotiate structured replies first"));
        }
        let (index, queries) = self.context_queries(data)?;
        let mut chosen = Vec::new();
        for (id, name) in (0..).zip(&self.exports[index].contexts) {
            if queries.contains(&name.as_str()) {
                put_context(replies, OptionCode::SetMetaContext, id, name);
                chosen.push(MetaContext { id, name: name.clone() });
            }
        }
        self.contexts = Some((index, chosen));
        Ok(())
    }

    /// The export and the queries of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
    fn context_queries<'a>(&self, data: &'a [u8]) -> Result<(usize, Vec<&'a str>), Refusal> {
        const MALFORMED: Refusal = (OptionRefusal::Invalid, "malformed request for contexts");
        let mut reader = Reader::new(data);
        let name = reader.string(MAX_STRING).ok_or(MALFORMED)?;
        let count = reader.u32().ok_or(MALFORMED)?;
        // `count` is the client's word; what is allocated follows what is really there.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(reader.string(MAX_STRING).ok_or(MALFORMED)?);
        }
        if !reader.is_empty() {
            return Err(MALFORMED);
        }
        let index = self.find(name).ok_or((OptionRefusal::UnknownExport, "no such export"))?;
        Ok((index, queries))
    }

    fn transmission(&mut self, export: usize) -> ServerOutcome {
        let contexts = match self.contexts.take() {
            // Contexts belong to the export for which they were chosen.
            Some((chosen_for, contexts)) if chosen_for == export => contexts,
            _ => Vec::new(),
        };
        let (flags, structured) = (self.flags(export), self.structured);
        ServerOutcome::Transmission(ClientChoice { export, flags, structured, contexts })
    }

    fn flags(&self, index: usize) -> TransmissionFlags {
        let flags = self.exports[index].flags | TransmissionFlags::HAS_FLAGS;
        if self.structured { flags } else { flags.without(TransmissionFlags::SEND_DF) }
    }

    fn find(&self, name: &str) -> Option<usize> {
        let only = (name.is_empty() && self.exports.len() == 1).then_some(0);
        self.exports.iter().position(|export| export.name == name).or(only)
    }
}

fn put_reply(out: &mut Vec<u8>, option: OptionCode, kind: u32, data: &[u8]) {
    out.extend_from_slice(&wire::OPTION_REPLY.to_be_bytes());
    out.extend_from_slice(&option.to_wire().to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    // Names and texts of exports are at most MAX_STRING long.
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

fn put_context(out: &mut Vec<u8>, option: OptionCode, id: u32, name: &str) {
    let data = [&id.to_be_bytes(), name.as_bytes()].concat();
    put_reply(out, option, REP_META_CONTEXT, &data);
}
