//! A small blocking NBD client on a socket and a thread of its own, as a guest's side would be. One request at a time.

use headwater_nbd::reply::ReplyHeader;
use headwater_nbd::{
    ClientAsk, ClientHandshake, Command, CommandFlags, Headers, NbdAddress, NbdUri, Request, ServerOffer,
    Step,
};
use std::io::{Error, Read, Result, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Longer than any request takes that is going to be answered.
const TIMEOUT: Duration = Duration::from_secs(30);

trait Socket: Read + Write {}
impl<T: Read + Write> Socket for T {}

/// A connection to an export.
pub struct Client {
    socket: Box<dyn Socket>,
    offer: ServerOffer,
    cookie: u64,
}

impl Client {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// If nobody listens there, or the export doesn't exist.
    pub fn connect(uri: &NbdUri) -> Result<Self> {
        let mut socket: Box<dyn Socket> = match &uri.address {
            NbdAddress::Tcp { host, port } => {
                let socket = TcpStream::connect((host.as_str(), *port))?;
                socket.set_nodelay(true)?;
                socket.set_read_timeout(Some(TIMEOUT))?;
                Box::new(socket)
            }
            NbdAddress::Unix { path } => {
                let socket = UnixStream::connect(path)?;
                socket.set_read_timeout(Some(TIMEOUT))?;
                Box::new(socket)
            }
        };
        // Simple replies are all that one request at a time needs.
        let ask = ClientAsk { export: uri.export.clone(), headers: Headers::Simple, contexts: Vec::new() };
        let offer = negotiate(&mut socket, ask)?;
        Ok(Self { socket, offer, cookie: 0 })
    }

    /// The export's size in bytes.
    pub fn size(&self) -> u64 {
        self.offer.size
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Those of the connection, and what the server answers.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.ask(Command::Read, CommandFlags::NONE, offset, buf.len(), &[])?;
        self.socket.read_exact(buf)
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// As for [`Client::read`].
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        self.ask(Command::Write, CommandFlags::NONE, offset, data.len(), data)
    }

    /// Makes a range read as zeroes; `keep` asks that it stay allocated.
    ///
    /// # Errors
    /// As for [`Client::read`].
    pub fn write_zeroes(&mut self, offset: u64, len: usize, keep: bool) -> Result<()> {
        let flags = if keep { CommandFlags::NO_HOLE } else { CommandFlags::NONE };
        self.ask(Command::WriteZeroes, flags, offset, len, &[])
    }

    /// Discards a range.
    ///
    /// # Errors
    /// As for [`Client::read`].
    pub fn trim(&mut self, offset: u64, len: usize) -> Result<()> {
        self.ask(Command::Trim, CommandFlags::NONE, offset, len, &[])
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As for [`Client::read`].
    pub fn flush(&mut self) -> Result<()> {
        self.ask(Command::Flush, CommandFlags::NONE, 0, 0, &[])
    }

    fn ask(
        &mut self,
        command: Command,
        flags: CommandFlags,
        offset: u64,
        len: usize,
        data: &[u8],
    ) -> Result<()> {
        self.cookie += 1;
        let len = u32::try_from(len).map_err(Error::other)?;
        let request = Request::new(command, self.cookie, offset, len.into()).with_flags(flags);
        self.socket.write_all(&request.encode(Headers::Simple))?;
        self.socket.write_all(data)?;
        let mut header = [0; ReplyHeader::SIMPLE_LEN];
        self.socket.read_exact(&mut header)?;
        match ReplyHeader::decode(&header, Headers::Simple, 0).map_err(Error::other)? {
            Some((ReplyHeader::Simple { cookie, error: None }, _)) if cookie == self.cookie => Ok(()),
            Some((ReplyHeader::Simple { error: Some(code), .. }, _)) => Err(Error::other(format!(
                "{command:?} of {len} bytes at {offset} was answered with {code:?}"
            ))),
            _ => Err(Error::other(format!("{command:?} of {len} bytes at {offset} got no proper answer"))),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Only a courtesy: a server must bear clients that vanish.
        let _ = self.socket.write_all(&Request::disconnect().encode(Headers::Simple));
    }
}

fn negotiate(socket: &mut Box<dyn Socket>, ask: ClientAsk) -> Result<ServerOffer> {
    let mut handshake = ClientHandshake::new(ask);
    let (mut input, mut output) = (Vec::new(), Vec::new());
    loop {
        match handshake.step(&input, &mut output).map_err(Error::other)? {
            Step::Done { outcome, .. } => return Ok(outcome),
            Step::Next { state, consumed } => {
                input.drain(..consumed);
                socket.write_all(&output)?;
                output.clear();
                handshake = state;
            }
            Step::More { state, needed } => {
                let known = input.len();
                input.resize(needed, 0);
                socket.read_exact(&mut input[known..]).map_err(|_| Error::other(state.closed()))?;
                handshake = state;
            }
        }
    }
}
