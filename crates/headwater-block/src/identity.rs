//! By what the bytes behind a node are recognised at another time, when the node that reached them is long gone.

/// What is known of some storage beside its bytes. Each mark is a name for people ("ETag") and a value that is only compared.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Change whenever the contents do: if they and the size are the same, so are the bytes.
    pub contents: Vec<(&'static str, String)>,
    /// Stay as they are while the contents change: if they are the same, it is the same file.
    pub object: Vec<(&'static str, String)>,
}

impl Identity {
    /// True if something marks the contents so well that bytes which were read another time, or through another node, may be taken for these: a weak ETag
    /// (`W/`) says only that people would not see a difference.
    pub fn marks_bytes(&self) -> bool {
        self.contents.iter().any(|(_, value)| !value.starts_with("W/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weak_marks_are_none() {
        let of = |contents: &[(&'static str, &str)]| Identity {
            contents: contents.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
            ..Identity::default()
        };
        assert!(of(&[("ETag", "\"a\"")]).marks_bytes());
        assert!(of(&[("ETag", "W/\"a\""), ("Last-Modified", "x")]).marks_bytes());
        assert!(!of(&[("ETag", "W/\"a\"")]).marks_bytes());
        assert!(!of(&[]).marks_bytes());
    }
}
