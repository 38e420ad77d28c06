//! Magic numbers of the protocol and a reader that cannot run past the end of its input.

/// First eight bytes of every server greeting.
pub(crate) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of a newstyle greeting; also the magic of every option that a client sends.
pub(crate) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Second magic of an oldstyle greeting, which we do not speak.
pub(crate) const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// Magic of a reply to an option.
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request.
pub(crate) const REQUEST: u32 = 0x2560_9513;
/// Magic of a simple reply.
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Magic of a chunk of a structured reply.
pub(crate) const CHUNK: u32 = 0x668e_33ef;
/// Magic of a request with an extended header.
pub(crate) const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
/// Magic of a chunk with an extended header.
pub(crate) const EXTENDED_CHUNK: u32 = 0x6e8a_278c;

/// Takes big-endian fields from the front of a slice; `None` when there are too few bytes.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string preceded by its length as 32 bits, which must be valid UTF-8 and at most `limit` bytes long.
    pub(crate) fn string(&mut self, limit: usize) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok()?;
        if length > limit {
            return None;
        }
        std::str::from_utf8(self.bytes(length)?).ok()
    }

    /// Everything that is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
