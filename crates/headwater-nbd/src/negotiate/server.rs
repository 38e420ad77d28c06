//! The server's side of negotiation.
//!
//! A client can keep a server busy here before it is known to be worth anything, so everything is bounded: the data
//! of an option that are buffered, those that are skipped, and the number of options.
//!
//! Exports may come and go meanwhile: each option is answered from those that there are at that moment. What a client was told of an
//! export by `GO` is what it gets.
//!
//! Where TLS is demanded, nothing is said in clear but that. A client that starts TLS goes on with the same handshake over TLS;
//! it has negotiated nothing before that could have been another's doing.

use super::{
    BlockSizes, EXPORT_NAME_PADDING, FIXED_NEWSTYLE, INFO_BLOCK_SIZE, INFO_DESCRIPTION, INFO_EXPORT,
    INFO_NAME, MAX_OPTION, MAX_STRING, MetaContext, NO_ZEROES, OPTION_LEN, OptionCode, REP_ACK, REP_INFO,
    REP_META_CONTEXT, REP_SERVER, Step, put_string,
};
use crate::error::{OptionRefusal, ProtocolError};
use crate::flags::TransmissionFlags;
use crate::headers::Headers;
use crate::wire::{self, Reader};

/// Longest data of an option that are skipped to keep an honest client of a newer protocol; beyond it the client is cut off.
const MAX_SKIPPED: u32 = 32 << 20;

/// Most options of one client. An honest one sends five or so, a lister a few for each export.
const MAX_OPTIONS: u32 = 4096;

/// What a server demands and grants besides its exports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerRules {
    /// Clients must start TLS, and learn nothing before. Otherwise they can't.
    pub tls: bool,
    /// A client that asks for the empty name gets the only export, if there is just one and none of that name.
    pub empty_name_is_only_export: bool,
}

/// One export as clients see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its name, at most [`MAX_STRING`] bytes.
    pub name: String,
    /// A text for people, at most [`MAX_STRING`] bytes; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// What it can do. [`TransmissionFlags::SEND_DF`] is withheld from clients without structured replies; those with extended headers
    /// and contexts get [`TransmissionFlags::BLOCK_STATUS_PAYLOAD`] besides.
    pub flags: TransmissionFlags,
    /// Limits on requests; must be [valid](BlockSizes::is_valid).
    pub block_sizes: BlockSizes,
    /// Names of the contexts of block status that it has.
    pub contexts: Vec<String>,
}

/// What a client chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientChoice {
    /// The export, as the client was told of it; without the flags that it was not.
    pub export: ExportInfo,
    /// Which headers requests have, and replies must have.
    pub headers: Headers,
    /// The contexts that each block status reply must carry. The id is the index in [`ExportInfo::contexts`].
    pub contexts: Vec<MetaContext>,
}

/// How negotiation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerOutcome {
    /// Requests follow.
    Transmission(ClientChoice),
    /// Send the output, start TLS, and go on with this over it. Nothing of the input is left.
    StartTls(Box<ServerHandshake>),
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

/// What there is to TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tls {
    None,
    Demanded,
    InUse,
}

/// A server that is negotiating with one client. See the [module](super) for how to drive it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerHandshake {
    stage: Stage,
    tls: Tls,
    empty_name_is_only_export: bool,
    fixed: bool,
    no_zeroes: bool,
    headers: Headers,
    /// Contexts chosen, and for which export.
    contexts: Option<(String, Vec<MetaContext>)>,
    options: u32,
}

type ServerStep = Step<ServerHandshake, ServerOutcome>;

/// Why an option is refused: the reply's type, and words for people.
type Refusal = (OptionRefusal, &'static str);

const TOO_BIG: Refusal = (OptionRefusal::TooBig, "the option's data are too long");
const NO_SUCH_EXPORT: Refusal = (OptionRefusal::UnknownExport, "no such export");

impl ServerHandshake {
    /// A server with these rules; appends its greeting to `output`.
    pub fn new(rules: ServerRules, output: &mut Vec<u8>) -> Self {
        output.extend_from_slice(&wire::NBDMAGIC.to_be_bytes());
        output.extend_from_slice(&wire::IHAVEOPT.to_be_bytes());
        output.extend_from_slice(&((FIXED_NEWSTYLE | NO_ZEROES) as u16).to_be_bytes());
        Self {
            stage: Stage::ClientFlags,
            tls: if rules.tls { Tls::Demanded } else { Tls::None },
            empty_name_is_only_export: rules.empty_name_is_only_export,
            fixed: false,
            no_zeroes: false,
            headers: Headers::Simple,
            contexts: None,
            options: 0,
        }
    }

    /// Takes at most one message from the front of `input` and appends what is to be sent to `output`. `exports` tells which exports
    /// there are now; it is asked only if a whole option is there.
    ///
    /// # Errors
    /// [`ProtocolError`]: the client is to be cut off.
    pub fn step(
        mut self,
        exports: impl FnOnce() -> Vec<ExportInfo>,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolError> {
        match self.stage {
            Stage::ClientFlags => self.client_flags(input),
            Stage::Options => self.option(exports, input, output),
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

    fn option(
        mut self,
        exports: impl FnOnce() -> Vec<ExportInfo>,
        input: &[u8],
        output: &mut Vec<u8>,
    ) -> Result<ServerStep, ProtocolError> {
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
        let in_clear = self.tls == Tls::Demanded;
        if in_clear && option == OptionCode::StartTls && length > 0 {
            return Err(ProtocolError::malformed("an option", "NBD_OPT_STARTTLS takes no data"));
        }
        let too_long = length > MAX_OPTION;
        let refusal = match option {
            OptionCode::Abort if too_long => Some(TOO_BIG),
            OptionCode::StartTls | OptionCode::Abort | OptionCode::ExportName if in_clear => None,
            _ if in_clear => Some((OptionRefusal::TlsRequired, "start TLS first")),
            OptionCode::Other(_) => Some((OptionRefusal::Unsupported, "unknown option")),
            _ if too_long => Some(TOO_BIG),
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
        if in_clear && option == OptionCode::StartTls {
            if input.len() > consumed {
                // Whoever sent it hoped that it would be taken for something said over TLS.
                let why = "more follows it in clear";
                return Err(ProtocolError::malformed("NBD_OPT_STARTTLS", why));
            }
            put_reply(output, option, REP_ACK, &[]);
            self.tls = Tls::InUse;
            return Ok(Step::Done { outcome: ServerOutcome::StartTls(Box::new(self)), consumed });
        }
        // In clear there are none.
        let exports = if in_clear { Vec::new() } else { exports() };
        debug_assert!(exports.iter().all(|export| export.block_sizes.is_valid()));
        Ok(match self.answer(option, &exports, &input[OPTION_LEN..consumed], output) {
            Some(outcome) => Step::Done { outcome, consumed },
            None => Step::Next { state: self, consumed },
        })
    }

    /// Answers one complete option; `Some` ends negotiation.
    fn answer(
        &mut self,
        option: OptionCode,
        exports: &[ExportInfo],
        data: &[u8],
        output: &mut Vec<u8>,
    ) -> Option<ServerOutcome> {
        let mut replies = Vec::new();
        let outcome = match option {
            OptionCode::ExportName => return Some(self.export_name(exports, data, output)),
            OptionCode::Abort => Ok(Some(ServerOutcome::Closed)),
            OptionCode::List => list(exports, data, &mut replies).map(|()| None),
            OptionCode::StartTls if self.tls == Tls::InUse => {
                Err((OptionRefusal::Invalid, "TLS is in use already"))
            }
            OptionCode::StartTls => {
                Err((OptionRefusal::Policy, "TLS is not configured here; connect without it"))
            }
            OptionCode::Info => self.info(option, exports, data, &mut replies).map(|_| None),
            OptionCode::Go => {
                self.info(option, exports, data, &mut replies).map(|export| Some(self.transmission(export)))
            }
            OptionCode::StructuredReply => self.agree_on(Headers::Structured, data).map(|()| None),
            OptionCode::ExtendedHeaders => self.agree_on(Headers::Extended, data).map(|()| None),
            OptionCode::ListMetaContext => self.list_contexts(exports, data, &mut replies).map(|()| None),
            OptionCode::SetMetaContext => self.set_contexts(exports, data, &mut replies).map(|()| None),
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

    fn export_name(&mut self, exports: &[ExportInfo], data: &[u8], output: &mut Vec<u8>) -> ServerOutcome {
        // Who has asked for extended headers must use `GO`, whose answer can be an error.
        let name = if self.headers.are_extended() { None } else { std::str::from_utf8(data).ok() };
        let Some(export) = name.and_then(|name| self.find(exports, name)) else {
            return ServerOutcome::Closed;
        };
        let padding = if self.no_zeroes { 0 } else { EXPORT_NAME_PADDING };
        output.extend_from_slice(&export.size.to_be_bytes());
        output.extend_from_slice(&self.flags(export).bits().to_be_bytes());
        output.resize(output.len() + padding, 0);
        self.transmission(export)
    }

    /// Answers `STRUCTURED_REPLY` and `EXTENDED_HEADERS`.
    fn agree_on(&mut self, headers: Headers, data: &[u8]) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err((OptionRefusal::Invalid, "options about headers take no data"));
        }
        if self.headers > headers {
            let words = "extended headers were negotiated before";
            return Err((OptionRefusal::ExtendedHeadersRequired, words));
        }
        if self.headers == headers {
            return Err((OptionRefusal::Invalid, "this was negotiated before"));
        }
        self.headers = headers;
        Ok(())
    }

    /// Answers `INFO` and `GO`; returns the export.
    fn info<'a>(
        &self,
        option: OptionCode,
        exports: &'a [ExportInfo],
        data: &[u8],
        replies: &mut Vec<u8>,
    ) -> Result<&'a ExportInfo, Refusal> {
        const MALFORMED: Refusal = (OptionRefusal::Invalid, "malformed request for an export");
        let mut reader = Reader::new(data);
        let name = reader.string(MAX_STRING).ok_or(MALFORMED)?;
        let count = reader.u16().ok_or(MALFORMED)?;
        let kinds = reader.rest();
        if kinds.len() != usize::from(count) * 2 {
            return Err(MALFORMED);
        }
        let wants = |kind: u16| kinds.chunks_exact(2).any(|wanted| wanted == kind.to_be_bytes());
        let export = self.find(exports, name).ok_or(NO_SUCH_EXPORT)?;
        let BlockSizes { minimum, preferred, maximum } = export.block_sizes;
        if minimum > 1 && !wants(INFO_BLOCK_SIZE) {
            return Err((OptionRefusal::BlockSizeRequired, "ask for the block sizes, and honour them"));
        }

        let mut put = |kind: u16, content: &[u8]| {
            let data = [&kind.to_be_bytes(), content].concat();
            put_reply(replies, option, REP_INFO, &data);
        };
        let size_and_flags =
            [&export.size.to_be_bytes()[..], &self.flags(export).bits().to_be_bytes()].concat();
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
        Ok(export)
    }

    fn list_contexts(
        &self,
        exports: &[ExportInfo],
        data: &[u8],
        replies: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        let (export, queries) = self.context_queries(exports, data)?;
        for name in &export.contexts {
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

    fn set_contexts(
        &mut self,
        exports: &[ExportInfo],
        data: &[u8],
        replies: &mut Vec<u8>,
    ) -> Result<(), Refusal> {
        // Whatever was chosen before is void, even if this attempt fails.
        self.contexts = None;
        if !self.headers.are_structured() {
            return Err((OptionRefusal::Invalid, "negotiate structured replies first"));
        }
        let (export, queries) = self.context_queries(exports, data)?;
        let mut chosen = Vec::new();
        for (id, name) in (0..).zip(&export.contexts) {
            if queries.contains(&name.as_str()) {
                put_context(replies, OptionCode::SetMetaContext, id, name);
                chosen.push(MetaContext { id, name: name.clone() });
            }
        }
        self.contexts = Some((export.name.clone(), chosen));
        Ok(())
    }

    /// The export and the queries of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
    fn context_queries<'a>(
        &self,
        exports: &'a [ExportInfo],
        data: &'a [u8],
    ) -> Result<(&'a ExportInfo, Vec<&'a str>), Refusal> {
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
        let export = self.find(exports, name).ok_or(NO_SUCH_EXPORT)?;
        Ok((export, queries))
    }

    fn transmission(&self, export: &ExportInfo) -> ServerOutcome {
        let contexts = self.chosen(export).cloned().collect();
        let export = ExportInfo { flags: self.flags(export), ..export.clone() };
        ServerOutcome::Transmission(ClientChoice { export, headers: self.headers, contexts })
    }

    /// The contexts that were chosen for an export.
    fn chosen<'a>(&'a self, export: &'a ExportInfo) -> impl Iterator<Item = &'a MetaContext> {
        // Contexts belong to the export for which they were chosen.
        let chosen = self.contexts.iter().filter(|(chosen_for, _)| *chosen_for == export.name);
        // Meanwhile another export may have got the name.
        let is_there =
            |context: &&MetaContext| export.contexts.get(context.id as usize) == Some(&context.name);
        chosen.flat_map(|(_, contexts)| contexts).filter(is_there)
    }

    fn flags(&self, export: &ExportInfo) -> TransmissionFlags {
        let flags = export.flags | TransmissionFlags::HAS_FLAGS;
        match self.headers {
            Headers::Simple => flags.without(TransmissionFlags::SEND_DF),
            Headers::Extended if self.chosen(export).next().is_some() => {
                flags | TransmissionFlags::BLOCK_STATUS_PAYLOAD
            }
            _ => flags,
        }
    }

    fn find<'a>(&self, exports: &'a [ExportInfo], name: &str) -> Option<&'a ExportInfo> {
        let only = (self.empty_name_is_only_export && name.is_empty() && exports.len() == 1).then_some(0);
        exports.iter().find(|export| export.name == name).or_else(|| exports.get(only?))
    }
}

fn list(exports: &[ExportInfo], data: &[u8], replies: &mut Vec<u8>) -> Result<(), Refusal> {
    if !data.is_empty() {
        return Err((OptionRefusal::Invalid, "NBD_OPT_LIST takes no data"));
    }
    for export in exports {
        let mut entry = Vec::new();
        put_string(&mut entry, &export.name);
        entry.extend_from_slice(export.description.as_bytes());
        put_reply(replies, OptionCode::List, REP_SERVER, &entry);
    }
    Ok(())
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
