//! A guest that does what its input says to an image, and knows what every byte must be.
//!
//! If a check found the image clean when it was opened, then it is *sound*, and this is asserted: everything succeeds, but for what can't
//! (compressed data that are none, a full disk, an image that may only be read); reads give what was written; no power cut corrupts
//! the image; when it was closed it is clean, without a leak, and holds the same bytes. Of other images it is asserted that nothing
//! panics, and, by libFuzzer, that memory and time are bounded.

use super::image::{backing, now};
use crate::capped::CappedNode;
use arbitrary::{Result, Unstructured};
use headwater_block::memory::MemoryNode;
use headwater_block::node::BackingLink;
use headwater_block::{
    Buffer, BufferMut, Error, ErrorKind, ExtentKind, Node, Resolved, WriteFlags, ZeroFlags,
};
use headwater_image::qcow2::check::{CheckOptions, CheckReport, Repair, check};
use headwater_image::qcow2::header::{AUTOCLEAR_BITMAPS, Header};
use headwater_image::qcow2::{Children, Qcow2Node, Qcow2Options};
use std::ops::Range;
use std::rc::Rc;

/// How many things a guest does at most.
const MAX_STEPS: usize = 64;

/// The largest disk of which the content is remembered, in bytes.
const MAX_MODEL: u64 = 512 << 10;

/// The largest disk that a guest asks for by name, in bytes.
const MAX_RESIZE: u32 = 600 << 10;

/// What a check says of an image, which it doesn't change.
pub(super) fn verdict(bytes: &[u8], memory: u64) -> headwater_block::Result<CheckReport> {
    let file = CappedNode::new("fuzzed.qcow2", bytes.to_vec());
    let report = now(check(file.clone(), CheckOptions { repair: Repair::None, memory }));
    assert!(file.contents() == bytes, "a check that may repair nothing changed the image");
    report
}

/// The content of a disk: what each byte is, if it can be read.
#[derive(PartialEq)]
pub(super) struct Content(Vec<Option<u8>>);

impl Content {
    /// What `node` reads as; `None` if that is too much.
    pub(super) fn of(node: &Qcow2Node) -> Option<Self> {
        if node.size() > MAX_MODEL {
            return None;
        }
        let mut content = Vec::new();
        while (content.len() as u64) < node.size() {
            let at = content.len() as u64;
            let len = (node.size() - at).min(node.cluster_size()) as usize;
            match now(node.read(at, BufferMut::new(len))) {
                Ok(bytes) => content.extend(bytes.iter().copied().map(Some)),
                Err(_) => content.resize(content.len() + len, None),
            }
        }
        Some(Self(content))
    }

    pub(super) fn is_readable(&self) -> bool {
        self.0.iter().all(Option::is_some)
    }

    #[track_caller]
    fn assert_at(&self, offset: u64, bytes: &[u8], what: &str) {
        let expected = &self.0[offset as usize..][..bytes.len()];
        for (at, (expected, byte)) in expected.iter().zip(bytes).enumerate() {
            let at = offset + at as u64;
            assert!(expected.is_none_or(|e| e == *byte), "{what}: byte {at} is {byte}, not {expected:?}");
        }
    }
}

/// See the module.
pub(super) struct Guest {
    file: Rc<CappedNode>,
    data_file: Rc<MemoryNode>,
    options: Qcow2Options,
    node: Rc<Qcow2Node>,
    sound: bool,
    /// It has bitmaps, which the first change outdates; what they take leaks then.
    has_bitmaps: bool,
    /// A change failed, as it may: there may be leaks, and it isn't known what is where.
    spoiled: bool,
    content: Option<Content>,
}

impl Guest {
    /// Opens an image. Fails if it is refused.
    pub(super) fn open(bytes: Vec<u8>, options: Qcow2Options) -> headwater_block::Result<Self> {
        let sound = verdict(&bytes, 1 << 20).is_ok_and(|report| report.is_clean());
        let file = CappedNode::new("fuzzed.qcow2", bytes);
        let data_file = MemoryNode::new("data.raw", (0..9000).map(|at| (at / 700) as u8).collect());
        let node = open(&file, &data_file, options)?;
        let has_bitmaps = node.header().autoclear & AUTOCLEAR_BITMAPS != 0;
        let mut guest =
            Self { file, data_file, options, node, sound, has_bitmaps, spoiled: false, content: None };
        guest.content = guest.on_disk();
        Ok(guest)
    }

    /// Whether a check found the image clean.
    pub(super) fn is_sound(&self) -> bool {
        self.sound
    }

    /// Asserts that `expected` is what the disk reads as at `offset`.
    #[track_caller]
    pub(super) fn expect(&self, offset: u64, expected: &[u8]) {
        let bytes = now(self.node.read(offset, BufferMut::new(expected.len()))).expect("it can be read");
        assert!(*bytes == *expected, "what is at {offset} isn't what was expected");
    }

    /// What somebody else would read who opened the image as it is in the file.
    fn on_disk(&self) -> Option<Content> {
        content(&self.file.contents(), &self.data_file, self.options)
    }

    /// Does what the input says until it ends.
    pub(super) fn act(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        for _ in 0..MAX_STEPS {
            if input.is_empty() {
                break;
            }
            self.step(input)?;
        }
        Ok(())
    }

    /// Closes the image and looks at what is left of it.
    pub(super) fn close(self) {
        let closed = now(self.node.close());
        self.may_fail(closed);
        if !self.sound {
            return;
        }
        let report = verdict(&self.file.contents(), 1 << 20).expect("a sound image can be checked");
        assert!(report.corruptions == 0, "the image is damaged after closing: {report:#?}");
        if !self.spoiled {
            let leaks = report.leaks == 0 || self.has_bitmaps;
            assert!(leaks, "the image leaks after closing: {report:#?}");
            self.assert_on_disk("after closing");
        }
    }

    #[track_caller]
    fn assert_on_disk(&self, what: &str) {
        let (Some(content), Some(now)) = (&self.content, self.on_disk()) else { return };
        assert_eq!(content.0.len(), now.0.len(), "{what}: the size");
        for (at, (expected, found)) in content.0.iter().zip(&now.0).enumerate() {
            assert!(
                expected.is_none() || expected == found,
                "{what}: byte {at}: {found:?}, not {expected:?}"
            );
        }
    }

    /// Asserts that a sound image does everything that it can.
    #[track_caller]
    fn may_fail(&self, done: headwater_block::Result<()>) {
        if let Err(error) = done {
            let expected = self.spoiled || self.node.is_read_only();
            assert!(!self.sound || expected, "a sound image refuses: {error}");
        }
    }

    /// A range within the disk; empty only if the disk is.
    fn range(&self, input: &mut Unstructured<'_>) -> Result<Range<u64>> {
        let size = self.node.size();
        let (place, len): (u32, u16) = (input.arbitrary()?, input.arbitrary()?);
        if size == 0 {
            return Ok(0..0);
        }
        let place = u64::from(place);
        let start = if size > 1 << 32 { (size >> 32) * place } else { place % size };
        Ok(start..(start + 1 + u64::from(len)).min(size))
    }

    fn step(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let choice: u8 = input.arbitrary()?;
        let flag = choice & 0x80 != 0;
        match choice & 15 {
            0..4 => {
                let (range, byte) = (self.range(input)?, input.arbitrary()?);
                self.write(range, byte, WriteFlags { fua: flag, compressed: choice & 0x40 != 0 });
            }
            4 | 5 => {
                let range = self.range(input)?;
                let flags = ZeroFlags { unmap: flag, fua: choice & 0x40 != 0, fast_only: choice & 0x20 != 0 };
                self.write_zeroes(range, flags);
            }
            6 | 7 => {
                let range = self.range(input)?;
                self.discard(range);
            }
            8 | 9 => {
                let range = self.range(input)?;
                self.read(range);
            }
            10 => {
                let range = self.range(input)?;
                self.status(range);
            }
            11 => {
                let flushed = now(self.node.flush());
                self.changed(flushed, 0..0, |_| ());
            }
            12 => {
                let size = if flag {
                    input.arbitrary::<u64>()?
                } else {
                    input.arbitrary::<u32>()?.min(MAX_RESIZE).into()
                };
                self.resize(size);
            }
            13 => self.change_backing(flag),
            14 => self.cut_power(flag),
            _ => self.write_beyond_the_end(input.arbitrary()?),
        }
        Ok(())
    }

    /// Takes note of a change of `range`: what it made of the content, or that it failed.
    #[track_caller]
    fn changed(
        &mut self,
        done: headwater_block::Result<()>,
        range: Range<u64>,
        change: impl FnOnce(&mut [Option<u8>]),
    ) {
        let Some(content) = &mut self.content else {
            // Whether what failed may fail isn't known of a disk whose content isn't.
            self.spoiled |= done.is_err();
            return;
        };
        let part = range.start as usize..range.end as usize;
        let Err(error) = done else { return change(&mut content.0[part]) };
        let unit = self.node.cluster_size() as usize;
        let around = part.start / unit * unit..part.end.next_multiple_of(unit).min(content.0.len());
        let unreadable = content.0[around].iter().any(Option::is_none);
        let full = error.kind() == ErrorKind::NoSpace;
        assert!(
            !self.sound || self.spoiled || unreadable || full || self.node.is_read_only(),
            "a sound image refuses to change {range:?}: {error}"
        );
        if !matches!(error.kind(), ErrorKind::ReadOnly) {
            content.0[part].fill(None);
            self.spoiled = true;
        }
    }

    fn write(&mut self, range: Range<u64>, byte: u8, flags: WriteFlags) {
        let len = (range.end - range.start) as usize;
        let data: Vec<u8> = (0..len).map(|at| byte.wrapping_add((at / 512) as u8)).collect();
        let done = now(self.node.write(range.start, Buffer::copy_of(&data), flags));
        self.changed(done, range, |bytes| {
            bytes.iter_mut().zip(&data).for_each(|(byte, new)| *byte = Some(*new))
        });
    }

    fn write_zeroes(&mut self, range: Range<u64>, flags: ZeroFlags) {
        let done = now(self.node.write_zeroes(range.start, range.end - range.start, flags));
        if done.as_ref().is_err_and(|error| flags.fast_only && error.kind() == ErrorKind::Unsupported) {
            return;
        }
        self.changed(done, range, |bytes| bytes.fill(Some(0)));
    }

    fn discard(&mut self, range: Range<u64>) {
        let len = (range.end - range.start) as usize;
        let done = now(self.node.discard(range.start, len as u64));
        let after = now(self.node.read(range.start, BufferMut::new(len)));
        let sound = self.sound;
        self.changed(done, range, |bytes| match after {
            Ok(after) => {
                for (byte, after) in bytes.iter_mut().zip(after.iter()) {
                    let kept = byte.is_none_or(|before| before == *after);
                    assert!(!sound || *after == 0 || kept, "a discard made {byte:?} into {after}");
                    *byte = Some(*after);
                }
            }
            Err(_) => {
                assert!(!sound || bytes.iter().any(Option::is_none), "a discard made unreadable");
                // What else the range holds now can't be seen from here.
                bytes.fill(None);
            }
        });
    }

    fn read(&mut self, range: Range<u64>) {
        let len = (range.end - range.start) as usize;
        let read = now(self.node.read(range.start, BufferMut::new(len)));
        if !range.is_empty() {
            self.resolve(range.clone());
        }
        let Some(content) = self.content.as_ref().filter(|_| self.sound) else { return };
        match read {
            Ok(bytes) => content.assert_at(range.start, &bytes, "read"),
            Err(error) => {
                let part = &content.0[range.start as usize..range.end as usize];
                assert!(
                    self.spoiled || part.iter().any(Option::is_none),
                    "a sound image can't be read: {error}"
                );
            }
        }
    }

    /// What `resolve` says, if it says something, is what reading gives.
    fn resolve(&self, range: Range<u64>) {
        let len = range.end - range.start;
        let (node, offset, len) = match self.node.resolve(range.clone()) {
            Resolved::Ask => return,
            Resolved::Zero { len: zeroes, .. } => {
                assert!(zeroes > 0 && zeroes <= len);
                (None, 0, zeroes)
            }
            Resolved::At { node, offset, len: there, .. } => {
                assert!(there > 0 && there <= len);
                (Some(node), offset, there)
            }
        };
        let bytes = match node {
            None => BufferMut::zeroed(len as usize),
            Some(node) => match now(node.read(offset, BufferMut::new(len as usize))) {
                Ok(bytes) => bytes,
                Err(error) => return self.may_fail(Err(error)),
            },
        };
        if let Some(content) = self.content.as_ref().filter(|_| self.sound) {
            content.assert_at(range.start, &bytes, "resolve");
        }
    }

    fn status(&mut self, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let extent = match now(self.node.status(at..range.end)) {
                Ok(extent) => extent,
                Err(error) => return self.may_fail(Err(error)),
            };
            assert!(extent.offset == at && extent.len > 0 && extent.end() <= range.end && extent.depth == 0);
            let known = self.content.as_ref().filter(|_| self.sound);
            if let Some(content) = known.filter(|_| extent.kind == ExtentKind::Zero) {
                content.assert_at(at, &vec![0; extent.len as usize], "status");
            }
            at = extent.end();
        }
    }

    fn resize(&mut self, size: u64) {
        let before = self.node.size();
        match now(self.node.resize(size)) {
            Ok(()) => {
                assert_eq!(self.node.size(), size);
                match &mut self.content {
                    Some(content) if size <= MAX_MODEL => {
                        let len = content.0.len();
                        content.0.resize(size as usize, Some(0));
                        if len % 512 != 0 {
                            // What the rest of a sector holds that is only partly of the disk isn't said.
                            let end = len.next_multiple_of(512).min(content.0.len());
                            if let Some(rest) = content.0.get_mut(len..end) {
                                rest.fill(None);
                            }
                        }
                    }
                    _ => self.content = None,
                }
            }
            Err(error) => {
                self.spoiled |= !matches!(error.kind(), ErrorKind::ReadOnly | ErrorKind::Unsupported);
                if self.node.size() != before {
                    self.content = None;
                }
            }
        }
    }

    fn change_backing(&mut self, keep: bool) {
        let new = keep.then_some(BackingLink { name: "base.raw", format: "raw" });
        let node = keep.then(backing);
        let had_one = self.node.backing().is_some();
        match now(self.node.change_backing(new, node)) {
            // Through the same backing the same is seen.
            Ok(()) if keep && had_one => {}
            Ok(()) => self.content = Content::of(&self.node),
            Err(error) => {
                self.spoiled |= !matches!(
                    error.kind(),
                    ErrorKind::ReadOnly | ErrorKind::Unsupported | ErrorKind::InvalidInput
                );
            }
        }
    }

    /// Opens the image again as a power cut would have left it, after a flush or without one.
    fn cut_power(&mut self, flush: bool) {
        let flushed = flush && now(self.node.flush()).is_ok();
        if self.sound {
            let report = verdict(&self.file.contents(), 1 << 20).expect("a sound image can be checked");
            assert!(report.corruptions == 0, "a power cut damaged the image: {report:#?}");
            if flushed && !self.spoiled {
                self.assert_on_disk("after a power cut");
            }
            let options = CheckOptions { repair: Repair::Leaks, memory: 0 };
            let report = now(check(self.file.clone(), options)).expect("a sound image can be repaired");
            assert!(report.is_clean(), "leaks can't be repaired: {report:#?}");
        }
        match open(&self.file, &self.data_file, self.options) {
            Ok(node) => self.node = node,
            Err(error) => return self.refused(&error),
        }
        if !flushed {
            self.content = Content::of(&self.node);
        }
    }

    fn refused(&self, error: &Error) {
        assert!(!self.sound, "a sound image can't be opened again: {error}");
    }

    fn write_beyond_the_end(&mut self, distance: u64) {
        let past = self.node.size().next_multiple_of(self.node.limits().write_alignment.into());
        let start = past.saturating_add(distance);
        let size = self.node.size();
        let done = now(self.node.write(start, Buffer::copy_of(&[0xee; 700]), WriteFlags::default()));
        assert!(done.is_err(), "a write at {start} of a disk of {size} bytes was accepted");
        assert!(now(self.node.write_zeroes(start, 700, ZeroFlags::default())).is_err());
        assert_eq!(self.node.size(), size);
    }
}

/// What an image's disk reads as, if it can be opened and isn't too large.
pub(super) fn content(image: &[u8], data_file: &MemoryNode, options: Qcow2Options) -> Option<Content> {
    let file = CappedNode::new("fuzzed.qcow2", image.to_vec());
    let data_file = MemoryNode::new("data.raw", data_file.contents());
    let node = open(&file, &data_file, Qcow2Options { read_only: true, ..options }).ok()?;
    Content::of(&node)
}

fn open(
    file: &Rc<CappedNode>,
    data_file: &Rc<MemoryNode>,
    options: Qcow2Options,
) -> headwater_block::Result<Rc<Qcow2Node>> {
    let header = now(Header::read(&**file))?;
    let children = Children {
        data_file: header.has_data_file().then(|| data_file.clone() as Rc<dyn Node>),
        backing: header.backing_name.is_some().then(backing),
    };
    now(Qcow2Node::open(file.clone(), children, options))
}
