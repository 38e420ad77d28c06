//! QMP and the option syntax of `qemu-storage-daemon` as a codec: bytes and text in, checked values out.
//!
//! Nothing here reads a socket, a clock or a file, and nothing depends on the rest of the workspace. A caller owns the
//! connection, hands over what it received, acts on what it is given, and sends what it is told to.
//!
//! | module      | what it holds                                                                                 |
//! |-------------|-----------------------------------------------------------------------------------------------|
//! | [`json`]    | the stream of JSON values ([`Reader`]), and the text of what is sent ([`encode`])                |
//! | [`message`] | what the values mean: [`Greeting`], [`Request`], [`Response`], [`Event`]                         |
//! | [`error`]   | [`QmpError`]: a class and a text                                                              |
//! | [`schema`]  | every command, event and type: checks of arguments, `query-qmp-schema`                        |
//! | [`keyval`]  | `key=value,nested.key=value`, the syntax of most options                                      |
//! | [`opts`]    | the older syntax of `--chardev` and `--trace`                                                 |
//! | [`option`]  | options of the command line, read and checked by the schema                                   |
//!
//! Names, types and texts of errors are those of QEMU 10.0, because clients match on them.
//!
//! Invariants: nothing that a client sends or a user types panics or uses more memory than a few times its length, and no
//! nesting is followed on the stack that wasn't bounded before.
//!
//! # A monitor, in order
//! 1. Send the [`Greeting`].
//! 2. Push what arrives into a [`Reader`]; for each value, [`Request::parse`].
//! 3. [`schema::check_command`] its arguments, act, and send a [`Response`] with the request's id.
//! 4. Send an [`Event`] whenever something happens, once `qmp_capabilities` was answered.

#![forbid(unsafe_code)]

pub mod error;
pub mod json;
pub mod keyval;
pub mod message;
pub mod option;
pub mod opts;
pub mod schema;

pub use error::{ErrorClass, QmpError};
pub use json::{Reader, Style, SyntaxError, encode};
pub use message::{Event, Greeting, Request, Response, Version};
pub use option::OptionKind;
pub use serde_json::{Map, Value};
