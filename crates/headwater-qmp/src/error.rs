//! Why a command is refused: a class for programs, a description for people.

use serde_json::{Value, json};
use std::fmt;

/// What a program may want to act on. Nearly everything is [`ErrorClass::GenericError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Nothing more special.
    GenericError,
    /// There is no such command, or it can't be given now.
    CommandNotFound,
    /// The device has no such activity (a job, say).
    DeviceNotActive,
    /// There is no such device.
    DeviceNotFound,
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
        })
    }
}

/// A refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpError {
    /// For programs.
    pub class: ErrorClass,
    /// For people; one sentence.
    pub desc: String,
}

impl QmpError {
    /// A refusal of `class`.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        Self { class, desc: desc.into() }
    }

    /// A refusal of the general class.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// As responses carry it.
    pub fn to_value(&self) -> Value {
        json!({"class": self.class.to_string(), "desc": self.desc})
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for QmpError {}
