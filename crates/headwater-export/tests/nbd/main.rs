//! The NBD server seen from outside: by hand-made clients ([`protocol`]) and by the tools that people use ([`tools`]); while its exports
//! come and go ([`exports`]), and at all kinds of addresses ([`addresses`]).

mod addresses;
mod common;
mod exports;
mod protocol;
mod tools;
