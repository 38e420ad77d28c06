//! One malformed image, and what must come of it.

use super::image::Image;

/// What the commands must make of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// All of them refuse it.
    Refused,
    /// It isn't opened; its own tables can be checked, and are sound.
    NotOpened,
    /// What is below it isn't opened, so that it isn't either. It can be looked at and checked by itself.
    ChainRefused,
    /// A check finds corruptions. What can be read is, and the rest is refused.
    Damaged,
    /// As many of its clusters can't be read, the others can. A check doesn't see it.
    Unreadable(u64),
    /// All is well.
    Harmless,
}

/// One malformed image.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) image: Image,
    /// Files beside it that it names, and that may be opened.
    pub(super) beside: Vec<(String, Image)>,
    pub(super) expected: Expected,
    /// A word that what is said about it contains.
    pub(super) says: String,
    /// What `--format` says.
    pub(super) format: Option<&'static str>,
}

impl Case {
    pub(super) fn new(
        name: impl Into<String>,
        expected: Expected,
        says: &str,
        damage: impl FnOnce(&mut Image),
    ) -> Self {
        let mut image = Image::sound();
        damage(&mut image);
        Self { name: name.into(), image, beside: Vec::new(), expected, says: says.to_owned(), format: None }
    }

    pub(super) fn refused(name: impl Into<String>, says: &str, damage: impl FnOnce(&mut Image)) -> Self {
        Self::new(name, Expected::Refused, says, damage)
    }

    pub(super) fn chain(name: impl Into<String>, says: &str, damage: impl FnOnce(&mut Image)) -> Self {
        Self::new(name, Expected::ChainRefused, says, damage)
    }

    pub(super) fn damaged(name: impl Into<String>, says: &str, damage: impl FnOnce(&mut Image)) -> Self {
        Self::new(name, Expected::Damaged, says, damage)
    }

    pub(super) fn harmless(name: impl Into<String>, damage: impl FnOnce(&mut Image)) -> Self {
        Self::new(name, Expected::Harmless, "", damage)
    }

    /// With another image beside it.
    pub(super) fn beside(mut self, name: &str, image: &Image) -> Self {
        let mut copy = Image::of(image.bytes());
        copy.resize(image.bytes().len() as u64);
        self.beside.push((name.to_owned(), copy));
        self
    }

    pub(super) fn but_its_tables_are_sound(mut self) -> Self {
        self.expected = Expected::NotOpened;
        self
    }

    pub(super) fn in_format(mut self, format: &'static str) -> Self {
        self.format = Some(format);
        self
    }
}
