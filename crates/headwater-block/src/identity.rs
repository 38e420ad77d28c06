//! By what the bytes behind a node are recognised at another time, when the node that reached them is long gone.

/// What is known of some storage beside its bytes. Each mark is a name for people ("ETag") and a value that is only compared.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Change whenever the contents do: if they and the size are the same, so are the bytes.
    pub contents: Vec<(&'static str, String)>,
    /// Stay as they are while the contents change: if they are the same, it is the same file.
    pub object: Vec<(&'static str, String)>,
}
