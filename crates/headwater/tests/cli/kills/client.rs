//! An NBD client of the tests' own: what it takes for done doesn't depend on headwater's idea of the protocol. One request at a time.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A request is durable when it is answered.
pub(crate) const FUA: u16 = 1;
/// Zeroes that stay allocated.
pub(crate) const NO_HOLE: u16 = 2;

/// Commands as the protocol numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Command {
    Read = 0,
    Write = 1,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
}

const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const REPLY_MAGIC: u64 = 0x0003_E889_0455_65A9;
const GO: u32 = 7;
const ACK: u32 = 1;
/// The error of a server that ends.
const SHUTTING_DOWN: u32 = 108;

/// A connection to an export.
pub(crate) struct Client {
    socket: UnixStream,
    cookie: u64,
}

impl Client {
    /// Connects to the export `name` at a socket.
    pub(crate) fn connect(path: &str, name: &str) -> Result<Self> {
        let mut socket = UnixStream::connect(path)?;
        // A request that isn't answered is a failure, not a test that never ends.
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        let greeting: [u8; 18] = read(&mut socket)?;
        assert_eq!(greeting[8..16], OPTION_MAGIC.to_be_bytes(), "an NBD server of today greets otherwise");
        // Fixed newstyle, without zeroes.
        let mut ask = 3u32.to_be_bytes().to_vec();
        ask.extend(OPTION_MAGIC.to_be_bytes());
        ask.extend(GO.to_be_bytes());
        // The name with its length, and the number of facts that are asked for.
        let len = u32::try_from(name.len()).expect("a short name");
        ask.extend((4 + len + 2).to_be_bytes());
        ask.extend(len.to_be_bytes());
        ask.extend(name.as_bytes());
        ask.extend(0u16.to_be_bytes());
        socket.write_all(&ask)?;
        loop {
            let head: [u8; 20] = read(&mut socket)?;
            assert_eq!(head[..8], REPLY_MAGIC.to_be_bytes(), "an answer to an option begins otherwise");
            let kind = u32::from_be_bytes(head[12..16].try_into().expect("4 bytes"));
            let len = u32::from_be_bytes(head[16..].try_into().expect("4 bytes"));
            socket.read_exact(&mut vec![0; len as usize])?;
            match kind {
                ACK => return Ok(Self { socket, cookie: 0 }),
                refused if refused >> 31 == 1 => {
                    return Err(Error::new(ErrorKind::NotFound, format!("refused with {refused:#x}")));
                }
                _ => {}
            }
        }
    }

    /// Sends a request and waits for its answer; gives what was read.
    ///
    /// # Panics
    /// If the server answers with an error, but for one: nothing that is asked here may fail, unless the server ends.
    pub(crate) fn ask(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        len: usize,
        data: &[u8],
    ) -> Result<Vec<u8>> {
        self.cookie += 1;
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend((command as u16).to_be_bytes());
        request.extend(self.cookie.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(len).expect("a short request").to_be_bytes());
        request.extend(data);
        self.socket.write_all(&request)?;
        let head: [u8; 16] = read(&mut self.socket)?;
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes(), "a simple reply begins otherwise");
        assert_eq!(head[8..], self.cookie.to_be_bytes(), "the answer is to another request");
        if head[4..8] == SHUTTING_DOWN.to_be_bytes() {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        assert_eq!(head[4..8], [0; 4], "{command:?} of {len} bytes at {offset} failed");
        let mut answer = vec![0; if command == Command::Read { len } else { 0 }];
        self.socket.read_exact(&mut answer)?;
        Ok(answer)
    }
}

fn read<const N: usize>(socket: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    socket.read_exact(&mut bytes)?;
    Ok(bytes)
}
