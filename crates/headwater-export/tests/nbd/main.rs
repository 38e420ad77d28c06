//! The NBD server seen from outside: by hand-made clients ([`protocol`]) and by the tools that people use ([`tools`]); while its exports
//! come and go ([`exports`]), at all kinds of addresses ([`addresses`]), and over TLS ([`tls`]).

mod addresses;
mod common;
mod exports;
mod extended;
mod protocol;
mod psk;
mod tls;
mod tools;
