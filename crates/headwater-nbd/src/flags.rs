//! The flag words of the protocol.

use std::fmt;
use std::ops::{BitOr, BitOrAssign};

macro_rules! flag_word {
    ($(#[$meta:meta])* $name:ident { $($(#[$flag_meta:meta])* $flag:ident = $bit:expr;)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(u16);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            $($(#[$flag_meta])* pub const $flag: Self = Self(1 << $bit);)*

            /// The flags of a word from the wire, unknown bits included.
            pub const fn from_bits(bits: u16) -> Self {
                Self(bits)
            }

            /// The word for the wire.
            pub const fn bits(self) -> u16 {
                self.0
            }

            /// Whether all flags of `other` are set.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether no flag is set.
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// These flags and those of `other`.
            #[must_use]
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// These flags without those of `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self {
                self.union(other)
            }
        }

        impl BitOrAssign for $name {
            fn bitor_assign(&mut self, other: Self) {
                *self = self.union(other);
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut rest = *self;
                let mut set = f.debug_set();
                $(if self.contains(Self::$flag) {
                    set.entry(&format_args!(stringify!($flag)));
                    rest = rest.without(Self::$flag);
                })*
                if !rest.is_empty() {
                    set.entry(&format_args!("{:#x}", rest.0));
                }
                set.finish()
            }
        }
    };
}

flag_word! {
    /// What an export can do (`NBD_FLAG_*`), told by the server when negotiation ends.
    TransmissionFlags {
        /// The word is meaningful; always set.
        HAS_FLAGS = 0;
        /// Writes are refused.
        READ_ONLY = 1;
        /// `FLUSH` is supported.
        SEND_FLUSH = 2;
        /// The FUA flag is supported.
        SEND_FUA = 3;
        /// The medium rotates.
        ROTATIONAL = 4;
        /// `TRIM` is supported.
        SEND_TRIM = 5;
        /// `WRITE_ZEROES` is supported.
        SEND_WRITE_ZEROES = 6;
        /// The "don't fragment" flag of reads is supported; only with structured replies.
        SEND_DF = 7;
        /// Several connections see each other's flushed writes.
        CAN_MULTI_CONN = 8;
        /// `RESIZE` is supported (an extension that is not used here).
        SEND_RESIZE = 9;
        /// `CACHE` is supported.
        SEND_CACHE = 10;
        /// The "fail unless fast" flag of `WRITE_ZEROES` is supported.
        SEND_FAST_ZERO = 11;
        /// A `BLOCK_STATUS` may say which contexts it wants; only with extended headers and contexts.
        BLOCK_STATUS_PAYLOAD = 12;
    }
}

flag_word! {
    /// Flags of one request (`NBD_CMD_FLAG_*`).
    CommandFlags {
        /// The data are durable before the reply. Valid with every command once `SEND_FUA` was offered.
        FUA = 0;
        /// `WRITE_ZEROES` must allocate, not punch a hole.
        NO_HOLE = 1;
        /// `READ` must be answered in one data chunk.
        DF = 2;
        /// `BLOCK_STATUS` wants one extent per context, within the request.
        REQ_ONE = 3;
        /// `WRITE_ZEROES` must fail at once unless it is faster than writing zeroes.
        FAST_ZERO = 4;
        /// The length is that of a payload which follows. Only with extended headers, where every `WRITE` is to have it.
        PAYLOAD_LEN = 5;
    }
}
