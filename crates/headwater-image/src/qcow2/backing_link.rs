//! Changes of the header by themselves: the link to the backing file, and feature bits that a writer must clear.
//!
//! The link changes in one write of the first 512 bytes, which is atomic: before it the header names the old backing file, after it the
//! new one. So everything that changes must be in these bytes: the offset and length of the name, and the extension that holds
//! the format. The new name itself, if it doesn't fit there, is written beforehand to where nothing refers to.

use super::extensions::{self, Extension};
use super::header::{Header, MAX_BACKING_NAME, Place};
use super::image::{Image, kept_autoclear};
use headwater_block::node::BackingLink;
use headwater_block::{Buffer, Error, ErrorKind, Node, Result, WriteFlags};
use std::ops::Range;
use std::rc::Rc;

#[cfg(test)]
mod tests;

/// What a disk writes atomically, in bytes.
const SECTOR: usize = 512;

/// A change of the link, worked out.
struct LinkChange {
    /// The first cluster after the change.
    cluster: Vec<u8>,
    /// What of it must be durable before the first sector is written.
    beforehand: Option<Range<usize>>,
}

impl Image {
    /// [`Node::change_backing`].
    pub(super) async fn change_backing(
        self: &Rc<Self>,
        new: Option<BackingLink<'_>>,
        node: Option<Rc<dyn Node>>,
    ) -> Result<()> {
        self.check_change(0, 0)?;
        if new.is_some() != node.is_some() {
            let text = format!("{}: a backing file needs both a name and a node, or neither", self.name);
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        // What the old backing supplied, and is in this image now, is durable before the link goes.
        self.commit().await?;
        let image = self.clone();
        let link = new.map(|link| (link.name.to_owned(), link.format.to_owned()));
        self.enqueue(async move { image.write_link(link).await }).await?;
        *self.backing.borrow_mut() = node;
        Ok(())
    }

    async fn write_link(&self, link: Option<(String, String)>) -> Result<()> {
        self.check_failed()?;
        let (change, old_cluster, sector) = {
            let disk = self.header.borrow();
            let link = link.as_ref().map(|(name, format)| (name.as_str(), format.as_str()));
            (plan(&disk.header, &disk.cluster, link, &self.name)?, disk.cluster.clone(), disk.sector)
        };
        if let Some(range) = change.beforehand {
            // Whole units of writing; the first sector stays as it was, even where it is in the same unit.
            let mut bytes = change.cluster.clone();
            bytes[..SECTOR].copy_from_slice(&old_cluster[..SECTOR]);
            let units = range.start / sector * sector..range.end.next_multiple_of(sector);
            self.file
                .write(units.start as u64, Buffer::copy_of(&bytes[units.clone()]), WriteFlags::default())
                .await?;
            self.barrier().await?;
        }
        let first = Buffer::copy_of(&change.cluster[..sector]);
        if let Err(err) = self.file.write(0, first, WriteFlags::default()).await {
            let why = "the header could not be written, and it isn't known which backing file it names now";
            return Err(self.fail(err.context(why)));
        }
        self.barrier().await?;
        let mut disk = self.header.borrow_mut();
        disk.header = Header::parse(&change.cluster, &self.name)?;
        disk.cluster = change.cluster;
        Ok(())
    }

    /// Before the first change of an image: clears the autoclear bits of features that are not kept up to date here, such as
    /// persistent bitmaps, so that nobody believes them later.
    pub(super) async fn prepare_header(self: &Rc<Self>) -> Result<()> {
        if self.prepared.get() {
            return Ok(());
        }
        let kept = kept_autoclear(self.data_file.is_some());
        let image = self.clone();
        // Requests that come while the bits are being cleared wait as well: that they are clear in memory says nothing about the disk.
        let clear = self.enqueue(async move {
            if !image.prepared.get() {
                image.write_header(|header| header.autoclear &= kept).await?;
                image.barrier().await?;
            }
            image.prepared.set(true);
            Ok(())
        });
        clear.await
    }
}

/// Works out the first cluster with another link (name and format). `image` is for messages.
fn plan(header: &Header, cluster: &[u8], link: Option<(&str, &str)>, image: &str) -> Result<LinkChange> {
    let mut new = header.clone();
    let mut bytes = cluster.to_vec();
    let area = extensions_area(header, link).ok_or_else(|| {
        let text = format!(
            "{image}: the format of the backing file doesn't fit in the first {SECTOR} bytes of the header, where it can be changed safely; \
             use qemu-img rebase while nothing else uses the image"
        );
        Error::new(ErrorKind::Unsupported, text)
    })?;
    if let Some(Area { changed, end }) = &area {
        let start = header.header_length;
        bytes[start..start + changed.len()].copy_from_slice(changed);
        new.extensions_end = *end;
    }
    let mut beforehand = None;
    new.backing_place = Place::default();
    if let Some((name, _)) = link {
        let place = name_place(header, new.extensions_end, name, cluster.len()).ok_or_else(|| {
            let text = format!(
                "{image}: the backing file's name ({} bytes) doesn't fit in the first cluster ({} bytes) beside the old one; use a shorter \
                 name",
                name.len(),
                cluster.len()
            );
            Error::new(ErrorKind::InvalidInput, text)
        })?;
        bytes[place.offset..place.end()].copy_from_slice(name.as_bytes());
        beforehand = (place.end() > SECTOR).then_some(place.offset..place.end());
        new.backing_place = place;
    }
    let fixed = new.encode_fixed();
    // Only fields that are known change, and they are within the first sector.
    let len = fixed.len().min(SECTOR);
    bytes[..len].copy_from_slice(&fixed[..len]);
    // Nothing is written that can't be read back.
    let parsed = Header::parse(&bytes, image)?;
    if parsed.backing_name.as_deref() != link.map(|(name, _)| name)
        || link.is_some_and(|(_, format)| parsed.backing_format().as_deref() != Some(format))
    {
        let text = format!("{image}: the backing file's name or format can't be stored in the header");
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    Ok(LinkChange { cluster: bytes, beforehand })
}

/// A change of the area of extensions.
struct Area {
    /// The bytes that change, from its start, all within the first sector.
    changed: Vec<u8>,
    /// Where the area ends afterwards, in the first cluster.
    end: usize,
}

/// The change of the area of extensions that a link needs; inner `None` if it stays as it is; outer `None` if there is no way.
fn extensions_area(header: &Header, link: Option<(&str, &str)>) -> Option<Option<Area>> {
    let start = header.header_length;
    let room = SECTOR.saturating_sub(start);
    let format = link
        .map(|(_, format)| Extension { kind: extensions::BACKING_FORMAT, data: format.as_bytes().to_vec() });
    let whole = |keep: &dyn Fn(&Extension) -> bool| {
        let others = header.extensions.iter().filter(|e| e.kind != extensions::BACKING_FORMAT && keep(e));
        let changed = extensions::encode(&format.iter().chain(others).cloned().collect::<Vec<_>>());
        let end = start + changed.len();
        (changed.len() <= room).then_some(Area { changed, end })
    };
    // All of it in the first sector.
    if let Some(area) = whole(&|_| true) {
        return Some(Some(area));
    }
    // A format that is left over without a backing file does no harm.
    let Some(format) = &format else { return Some(None) };
    // The format in its old place, which is in the first sector.
    if let Some(at) = header.extensions.iter().position(|e| e.kind == extensions::BACKING_FORMAT) {
        let len: usize = header.extensions[..=at].iter().map(Extension::encoded_len).sum();
        if len <= room && header.extensions[at].encoded_len() == format.encoded_len() {
            let mut list = header.extensions[..=at].to_vec();
            list[at] = format.clone();
            let mut changed = extensions::encode(&list);
            changed.truncate(len);
            return Some(Some(Area { changed, end: header.extensions_end }));
        }
    }
    // Without the names of features, which are only for messages.
    whole(&|e| e.kind != extensions::FEATURE_NAMES).map(Some)
}

/// Where a new name goes: after the extensions, in the first sector if it fits there; else where neither the old name nor any extension is.
fn name_place(old: &Header, extensions_end: usize, name: &str, cluster: usize) -> Option<Place> {
    let len = name.len();
    if len == 0 || len > MAX_BACKING_NAME {
        return None;
    }
    if extensions_end + len <= SECTOR {
        return Some(Place { offset: extensions_end, len });
    }
    let first = extensions_end.max(old.extensions_end).max(SECTOR).next_multiple_of(8);
    let behind = old.backing_place.end().next_multiple_of(8).max(first);
    let overlaps =
        |offset: usize| offset < old.backing_place.end() && old.backing_place.offset < offset + len;
    [first, behind]
        .into_iter()
        .find(|offset| offset + len <= cluster && !overlaps(*offset))
        .map(|offset| Place { offset, len })
}
