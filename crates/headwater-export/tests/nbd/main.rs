//! The NBD server seen from outside: by hand-made clients ([`protocol`]) and by the tools that people use ([`tools`]).

mod common;
mod protocol;
mod tools;
