//! Pooled, aligned memory that requests carry from the socket to the disk and back.
//!
//! [`BufferMut`] is the only handle to its range of bytes and can be split and joined, so that the parts of one request
//! can be filled by several I/Os at once. [`Buffer`] is frozen: cheap to clone and to slice, never written again.
//!
//! Memory comes from a thread-local pool of 4 KiB-aligned size classes. A fresh mapping costs a page fault per 4 KiB, which for
//! large requests is more than the I/O itself; a pooled one costs a push and a pop. Memory goes back to the pool of the thread
//! that drops the last handle; the handles are not `Send`, so it is the thread that it came from.
//!
//! Larger classes are cut from huge pages: the kernel pins, maps and hands over each page of a direct I/O. 1 MiB in 256 pages cost 160 us of
//! CPU a read on a virtual disk, in a huge page 30 us, and twice as many came through.
//!
//! A buffer takes its memory when somebody first looks at its bytes: one that waits for a reply from far away needs none yet, and those whose
//! bytes do arrive share what is warm. Fresh memory is dear: on a virtual machine that gives free pages back to its host the first touch of a
//! huge page took up to 3 ms (0.2 ms otherwise), which was 40 to 45 % of the CPU time of a stream of 512 MiB.
//!
//! This module is one of the few that may use `unsafe`. What it relies on:
//! - An [`Allocation`] is initialised (zeroed) when it is created, and stays initialised for ever.
//! - The ranges of all live `BufferMut`s of one allocation are disjoint: they are only made by splitting.
//! - A `Buffer` is only made from a `BufferMut`, whose range nobody else can write.

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::cell::{Cell, OnceCell, RefCell};
use std::ffi::c_void;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::rc::Rc;

/// The alignment in bytes of every allocation: enough for O_DIRECT everywhere.
pub const ALIGNMENT: usize = 4096;

/// The smallest and the largest pooled size, as powers of two. Larger ones go to the global allocator.
const MIN_CLASS: u32 = 12;
const MAX_CLASS: u32 = 22;

/// From this class on, memory is cut from chunks of huge pages; the size of a chunk, and of a huge page.
const MIN_HUGE_CLASS: u32 = 16;
const HUGE_PAGE: usize = 2 << 20;

/// How many free bytes a thread's pool keeps per class before it gives memory back.
const POOL_BYTES_PER_CLASS: usize = 32 << 20;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool::new()) };
}

struct Pool {
    free: [Vec<RawMemory>; (MAX_CLASS - MIN_CLASS + 1) as usize],
}

impl Pool {
    const fn new() -> Self {
        Self { free: [const { Vec::new() }; (MAX_CLASS - MIN_CLASS + 1) as usize] }
    }

    /// Free memory of a class, if there is some or it comes in chunks.
    fn take(&mut self, class: usize) -> Option<RawMemory> {
        let free = &mut self.free[class];
        if free.is_empty() && class >= (MIN_HUGE_CLASS - MIN_CLASS) as usize {
            free.extend(RawMemory::pieces(1 << (class + MIN_CLASS as usize)));
        }
        let memory = free.pop()?;
        if let Some(chunk) = &memory.chunk {
            chunk.free.set(chunk.free.get() - 1);
        }
        Some(memory)
    }

    /// Takes memory back, and keeps no more of it than is worth keeping. Chunks can only be given back whole.
    fn give(&mut self, class: usize, memory: RawMemory) {
        let free = &mut self.free[class];
        let size = memory.size;
        let Some(chunk) = memory.chunk.clone() else {
            if (free.len() + 1) * size <= POOL_BYTES_PER_CLASS {
                free.push(memory);
            }
            return;
        };
        free.push(memory);
        chunk.free.set(chunk.free.get() + 1);
        if free.len() * size > POOL_BYTES_PER_CLASS && chunk.free.get() == chunk.pieces {
            free.retain(|piece| !piece.chunk.as_ref().is_some_and(|other| Rc::ptr_eq(other, &chunk)));
        }
    }
}

/// Memory that is aligned to [`ALIGNMENT`] and initialised: a part of a chunk, or from the global allocator.
struct RawMemory {
    ptr: NonNull<u8>,
    size: usize,
    chunk: Option<Rc<Chunk>>,
}

impl RawMemory {
    fn new(size: usize) -> Self {
        let layout = Self::layout(size);
        // SAFETY: `layout` has a size above 0.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Self { ptr, size, chunk: None }
    }

    /// A new chunk, cut into pieces of `size`, a power of two and a multiple of [`ALIGNMENT`], for the pool; there is at least one.
    fn pieces(size: usize) -> impl Iterator<Item = Self> {
        let len = size.max(HUGE_PAGE);
        let pieces = len / size;
        let chunk = Rc::new(Chunk::new(len, pieces));
        (0..pieces).map(move |i| {
            // SAFETY: the chunk has `len` bytes from `start`.
            let ptr = unsafe { chunk.start.add(i * size) };
            Self { ptr, size, chunk: Some(chunk.clone()) }
        })
    }

    fn layout(size: usize) -> Layout {
        assert!(size > 0);
        Layout::from_size_align(size, ALIGNMENT).expect("sizes come from requests, far below isize::MAX")
    }
}

impl Drop for RawMemory {
    fn drop(&mut self) {
        if self.chunk.is_some() {
            return;
        }
        // SAFETY: `ptr` came from `alloc_zeroed` with this very layout and is freed once.
        unsafe { std::alloc::dealloc(self.ptr.as_ptr(), Self::layout(self.size)) }
    }
}

/// A mapping of zero bytes, of huge pages where the system has them. Lives until its last piece is freed.
struct Chunk {
    /// Aligned to [`HUGE_PAGE`], with as many bytes as were asked for; they lie within the mapping.
    start: NonNull<u8>,
    mapping: NonNull<c_void>,
    mapped: usize,
    pieces: usize,
    /// How many pieces are in the pool.
    free: Cell<usize>,
}

impl Chunk {
    fn new(len: usize, pieces: usize) -> Self {
        // Mappings start at any page. What lies before and after the aligned part is never touched, so it takes no memory.
        let mapped = len + HUGE_PAGE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without a wish for an address, the mapping is new and nobody else's.
        let mapping = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, protection, MapFlags::PRIVATE) };
        let Some(mapping) = mapping.ok().and_then(NonNull::new) else {
            handle_alloc_error(RawMemory::layout(mapped));
        };
        let padding = mapping.as_ptr().addr().next_multiple_of(HUGE_PAGE) - mapping.as_ptr().addr();
        // SAFETY: the padding is less than a huge page, by which the mapping is longer than `len`.
        let start = unsafe { mapping.cast::<u8>().add(padding) };
        // SAFETY: the range is ours, and the advice changes no contents. Where it isn't heeded, there are small pages.
        let _ = unsafe { madvise(start.as_ptr().cast(), len, Advice::LinuxHugepage) };
        Self { start, mapping, mapped, pieces, free: Cell::new(pieces) }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: the mapping is unmapped once, and no piece refers to it any more. It can't fail for a mapping that is there.
        let _ = unsafe { munmap(self.mapping.as_ptr(), self.mapped) };
    }
}

/// The size class of a request for `len` bytes, and its index in the pool if it is pooled.
fn class_of(len: usize) -> (usize, Option<usize>) {
    let size = len.max(1 << MIN_CLASS).next_power_of_two();
    let class = size.trailing_zeros();
    if class <= MAX_CLASS {
        (size, Some((class - MIN_CLASS) as usize))
    } else {
        (len.next_multiple_of(ALIGNMENT), None)
    }
}

/// Memory shared by the handles to its parts: taken from the pool when one of them first looks at it, and given back with the last one.
struct Allocation {
    len: usize,
    memory: OnceCell<RawMemory>,
}

impl Allocation {
    fn new(len: usize) -> Rc<Self> {
        Rc::new(Self { len, memory: OnceCell::new() })
    }

    fn take(len: usize) -> RawMemory {
        let (size, class) = class_of(len);
        let pooled = class.and_then(|c| POOL.with_borrow_mut(|pool| pool.take(c)));
        pooled.unwrap_or_else(|| RawMemory::new(size))
    }

    fn ptr(&self) -> *mut u8 {
        self.memory.get_or_init(|| Self::take(self.len)).ptr.as_ptr()
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        if let (_, Some(class)) = class_of(memory.size) {
            // While the thread ends the pool is gone; then the memory is simply freed.
            let _ = POOL.try_with(|pool| {
                pool.borrow_mut().give(class, memory);
            });
        }
    }
}

/// The only handle to a range of bytes, which it can write.
pub struct BufferMut {
    memory: Rc<Allocation>,
    start: usize,
    len: usize,
}

impl BufferMut {
    /// A buffer of `len` bytes whose contents are arbitrary: whoever gets it fills all of it. It takes no memory until it is looked at.
    pub fn new(len: usize) -> Self {
        Self { memory: Allocation::new(len), start: 0, len }
    }

    /// The length in bytes. Unlike that of the slice, it can be had without memory.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are no bytes; as [`BufferMut::len`].
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let mut buf = Self::new(len);
        buf.fill(0);
        buf
    }

    /// A buffer that holds a copy of `data`.
    pub fn copy_of(data: &[u8]) -> Self {
        let mut buf = Self::new(data.len());
        buf.copy_from_slice(data);
        buf
    }

    /// Keeps the first `at` bytes and returns a handle to the rest.
    ///
    /// # Panics
    /// If `at` is past the end.
    pub fn split_off(&mut self, at: usize) -> BufferMut {
        assert!(at <= self.len, "split at {at} of {} bytes", self.len);
        let rest = BufferMut { memory: self.memory.clone(), start: self.start + at, len: self.len - at };
        self.len = at;
        rest
    }

    /// Puts back together what [`BufferMut::split_off`] took apart: `next` must be what directly followed.
    ///
    /// # Panics
    /// If it isn't.
    pub fn join(mut self, next: BufferMut) -> BufferMut {
        assert!(Rc::ptr_eq(&self.memory, &next.memory), "parts of different buffers");
        assert_eq!(self.start + self.len, next.start, "parts that are not neighbours");
        self.len += next.len;
        self
    }

    /// True if no other handle has a part of this memory: then nobody will join this one to another, and a buffer of the same length may
    /// take its place.
    pub fn is_whole(&self) -> bool {
        Rc::strong_count(&self.memory) == 1
    }

    /// Gives up the right to write, so that the bytes can be shared.
    pub fn freeze(self) -> Buffer {
        Buffer { memory: self.memory, start: self.start, len: self.len }
    }

    /// Shortens the buffer to `len` bytes; no effect if it isn't longer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Deref for BufferMut {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        if self.len == 0 {
            return &[];
        }
        // SAFETY: the range lies within the initialised allocation, and only this handle can write it.
        unsafe { std::slice::from_raw_parts(self.memory.ptr().add(self.start), self.len) }
    }
}

impl DerefMut for BufferMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as above; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.memory.ptr().add(self.start), self.len) }
    }
}

impl fmt::Debug for BufferMut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferMut({} bytes)", self.len)
    }
}

/// A shared handle to bytes that nobody writes any more.
#[derive(Clone)]
pub struct Buffer {
    memory: Rc<Allocation>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// A buffer that holds a copy of `data`.
    pub fn copy_of(data: &[u8]) -> Self {
        BufferMut::copy_of(data).freeze()
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        BufferMut::zeroed(len).freeze()
    }

    /// A handle to a part of the bytes.
    ///
    /// # Panics
    /// If the range isn't within the buffer.
    pub fn slice(&self, range: Range<usize>) -> Buffer {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} bytes", self.len);
        Buffer { memory: self.memory.clone(), start: self.start + range.start, len: range.end - range.start }
    }

    /// The right to write back, if this is the only handle to the whole allocation.
    pub fn try_into_mut(self) -> Result<BufferMut, Buffer> {
        if Rc::strong_count(&self.memory) == 1 {
            Ok(BufferMut { memory: self.memory, start: self.start, len: self.len })
        } else {
            Err(self)
        }
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies within the initialised allocation; it was frozen, so nobody writes it.
        unsafe { std::slice::from_raw_parts(self.memory.ptr().add(self.start), self.len) }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_comes_back_from_the_pool() {
        for len in [0, 1, 4096, 5000, 1 << 20, (4 << 20) + 1] {
            let buf = BufferMut::new(len);
            assert_eq!(buf.len(), len);
            assert_eq!(buf.memory.ptr() as usize % ALIGNMENT, 0);
        }
        let first = BufferMut::new(8192).memory.ptr();
        assert_eq!(BufferMut::new(5000).memory.ptr(), first, "the same class reuses what was just freed");
    }

    #[test]
    fn a_buffer_takes_no_memory_until_it_is_looked_at() {
        let mut head = BufferMut::new(2 << 20);
        let mut tail = head.split_off(1 << 20);
        let mut nothing = tail.split_off(1 << 20);
        nothing.fill(0);
        assert_eq!((head.len(), tail.len(), nothing.is_empty()), (1 << 20, 1 << 20, true));
        assert!(head.memory.memory.get().is_none());
        tail[0] = 7;
        assert_eq!(head.join(tail).freeze()[1 << 20], 7);
    }

    #[test]
    fn pieces_of_a_chunk_are_disjoint_and_whole_chunks_are_given_back() {
        for size in [64 << 10, 1 << 20, 2 << 20, 4 << 20] {
            let count = 2 * POOL_BYTES_PER_CLASS / size;
            let mut buffers: Vec<BufferMut> = (0..count).map(|_| BufferMut::new(size)).collect();
            for (i, buf) in buffers.iter_mut().enumerate() {
                assert_eq!(buf.as_ptr().addr() % size.min(HUGE_PAGE), 0);
                assert_eq!((buf[0], buf[size - 1]), (0, 0), "fresh memory is zeroed");
                (buf[0], buf[size - 1]) = (i as u8, i as u8);
            }
            assert!(buffers.iter().enumerate().all(|(i, buf)| (buf[0], buf[size - 1]) == (i as u8, i as u8)));
            let free = || POOL.with_borrow(|pool| pool.free[class_of(size).1.unwrap()].len());
            // One of each chunk stays in use, so that none can be given back, and what is free is used again.
            let kept: Vec<BufferMut> = buffers.into_iter().step_by(HUGE_PAGE.div_ceil(size)).collect();
            let left = free();
            assert_eq!(left, count - kept.len());
            let again: Vec<BufferMut> = (0..left).map(|_| BufferMut::zeroed(size)).collect();
            assert_eq!(free(), 0);
            drop((again, kept));
            assert!(free() * size <= POOL_BYTES_PER_CLASS, "{} free pieces of {size}", free());
        }
    }

    #[test]
    fn parts_are_disjoint_and_join_again() {
        let mut head = BufferMut::zeroed(100);
        let mut tail = head.split_off(40);
        head.fill(1);
        tail.fill(2);
        let whole = head.join(tail).freeze();
        assert!(whole[..40].iter().all(|b| *b == 1) && whole[40..].iter().all(|b| *b == 2));
        let part = whole.slice(39..41);
        drop(whole);
        assert_eq!(&part[..], &[1, 2]);
    }

    #[test]
    #[should_panic(expected = "not neighbours")]
    fn parts_that_are_not_neighbours_do_not_join() {
        let mut a = BufferMut::new(30);
        let mut b = a.split_off(10);
        let c = b.split_off(10);
        let _ = a.join(c);
    }

    #[test]
    fn only_a_sole_handle_gets_the_right_to_write_back() {
        let buf = Buffer::copy_of(b"abc");
        let other = buf.clone();
        let buf = buf.try_into_mut().unwrap_err();
        drop(other);
        assert!(buf.try_into_mut().is_ok());
    }
}
