//! What QMP answers instead of a result: a class to match on and a text to show.

use serde::Serialize;

use crate::json::SyntaxError;

/// What kind of error it is. All but the first have a meaning to old clients only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum ErrorClass {
    /// Any error.
    GenericError,
    /// The command doesn't exist, or not in this phase of the connection.
    CommandNotFound,
    /// The device or job doesn't exist, or isn't in use.
    DeviceNotActive,
    /// There is no such device.
    DeviceNotFound,
    /// The kernel lacks something that is needed.
    KVMMissingCap,
}

/// The error of one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// What kind of error it is.
    pub class: ErrorClass,
    /// What is wrong, for people.
    pub desc: String,
    /// What may have led to it, or may help. It isn't part of the answer, and is told where no program listens: on the command line.
    #[serde(skip)]
    pub hint: Option<String>,
}

impl QmpError {
    /// An error of class [`ErrorClass::GenericError`].
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into(), hint: None }
    }

    /// The same error with a hint.
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// An error of class [`ErrorClass::DeviceNotFound`].
    pub fn device_not_found(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::DeviceNotFound, desc: desc.into(), hint: None }
    }

    /// An error of class [`ErrorClass::DeviceNotActive`].
    pub fn device_not_active(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::DeviceNotActive, desc: desc.into(), hint: None }
    }

    /// No command has this name.
    pub fn command_not_found(name: &str) -> Self {
        Self::not_found(format!("The command {name} has not been found"))
    }

    /// A command other than `qmp_capabilities` came before it.
    pub fn negotiation_expected() -> Self {
        Self::not_found("Expecting capabilities negotiation with 'qmp_capabilities'")
    }

    /// `qmp_capabilities` came a second time.
    pub fn negotiation_complete() -> Self {
        Self::not_found("Capabilities negotiation is already complete, command ignored")
    }

    /// `qmp_capabilities` asks for a capability that the greeting didn't offer.
    pub fn capability_unavailable(capability: &str) -> Self {
        Self::generic(format!("Capability {capability} not available"))
    }

    fn not_found(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::CommandNotFound, desc: desc.into(), hint: None }
    }

    // The texts that the schema's checks and the option parsers share.

    pub(crate) fn missing(name: &str) -> Self {
        Self::generic(format!("Parameter '{name}' is missing"))
    }

    pub(crate) fn unexpected(name: &str) -> Self {
        Self::generic(format!("Parameter '{name}' is unexpected"))
    }

    pub(crate) fn wrong_type(name: &str, expected: &str) -> Self {
        Self::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
    }

    pub(crate) fn expects(name: &str, expected: &str) -> Self {
        Self::generic(format!("Parameter '{name}' expects {expected}"))
    }

    pub(crate) fn not_accepted(name: &str, value: &str) -> Self {
        Self::generic(format!("Parameter '{name}' does not accept value '{value}'"))
    }

    pub(crate) fn invalid_parameter(name: &str) -> Self {
        Self::generic(format!("Invalid parameter '{name}'"))
    }
}

impl From<SyntaxError> for QmpError {
    fn from(error: SyntaxError) -> Self {
        Self::generic(error.to_string())
    }
}
