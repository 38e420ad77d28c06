//! A front end's connection: its messages, one after the other.
//!
//! The `vhost` crate reads a message with calls that wait. So it is called only when the whole of a message is in the socket, and when there
//! is room for its reply: then it waits for nothing. What a message needs that does take time, a queue coming to rest, is done before.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net;
use std::rc::Rc;
use std::sync::Arc;

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{IoSliceMut, ioctl_fionread};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::task::coop::consume_budget;
use vhost::vhost_user::message::{BackendReq, FrontendReq, MAX_MSG_SIZE};
use vhost::vhost_user::{BackendReqHandler, Error};

use super::device::Device;
use crate::stop::StopListener;

/// The size in bytes of what stands in front of each message.
const HEADER: usize = 12;

/// The version of the protocol, as it stands in a message's flags.
const VERSION: u32 = 1;

/// Why a connection ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The front end closed it.
    Left,
    /// The export is to end.
    Stopped,
    /// It broke the protocol, or asked for what can't be done.
    CutOff(Error),
    /// The socket failed.
    Broken(io::Error),
}

/// See the module.
pub(crate) struct Connection {
    socket: UnixStream,
    requests: BackendReqHandler<Device>,
    device: Arc<Device>,
    notices: Rc<Notices>,
}

/// The start of a message that is there in whole.
struct Head {
    code: u32,
    /// The first two words of what follows, zero if there is less: often a queue and a value.
    words: [u32; 2],
}

impl Connection {
    /// Takes over a connection, of a socket that doesn't block.
    ///
    /// # Errors
    /// If the system has no descriptor left.
    pub(crate) fn new(socket: net::UnixStream, device: Device, notices: Rc<Notices>) -> io::Result<Self> {
        #[expect(clippy::arc_with_non_send_sync, reason = "what the crate wants; it stays on its thread")]
        let device = Arc::new(device);
        let requests = BackendReqHandler::from_stream(socket.try_clone()?, device.clone());
        Ok(Self { socket: UnixStream::from_std(socket)?, requests, device, notices })
    }

    /// Does what the front end says, until it leaves or `stop` orders the end. Must be driven to its end, and [`Connection::close`] must follow.
    pub(crate) async fn serve(&mut self, stop: &StopListener) -> End {
        loop {
            // Reading by hand isn't counted. A front end that never pauses must not keep the thread from everybody else.
            consume_budget().await;
            let next = tokio::select! {
                biased;
                () = poll_fn(|cx| stop.poll(cx)) => return End::Stopped,
                next = self.next() => next,
            };
            let done = match next {
                Ok(head) => self.obey(head).await,
                Err(end) => Err(end),
            };
            if let Err(end) = done {
                return end;
            }
        }
    }

    /// Ends it: the front end is told at once, and the requests that were taken are driven to their end.
    pub(crate) async fn close(self) {
        self.notices.close();
        // It fails only if the connection is gone already.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        self.device.stop_all().await;
    }

    /// Does what the message says that is there.
    async fn obey(&mut self, Head { code, words }: Head) -> Result<(), End> {
        self.device.prepare(code, words[0], words[1]).await;
        let channel = if code == u32::from(FrontendReq::SET_BACKEND_REQ_FD) { self.attached() } else { None };
        self.requests.handle_request().map_err(|error| match error {
            Error::Disconnected => End::Left,
            Error::SocketBroken(error) => End::Broken(error),
            other => End::CutOff(other),
        })?;
        if let Some(channel) = channel {
            self.notices.open(channel);
        }
        self.device.start_ready();
        Ok(())
    }

    /// Waits until a whole message is there, and room for its reply. May be dropped at any time.
    async fn next(&self) -> Result<Head, End> {
        self.wait_for_room().await.map_err(End::Broken)?;
        loop {
            let ready = self.socket.ready(Interest::READABLE).await.map_err(End::Broken)?;
            match self.socket.try_io(Interest::READABLE, || self.look()) {
                Ok(head) => return Ok(head),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(End::Broken(error)),
                Err(_) if ready.is_read_closed() => return Err(End::Left),
                Err(_) => {}
            }
        }
    }

    /// Looks at what is there, without taking it. `WouldBlock` if it isn't a whole message yet.
    fn look(&self) -> io::Result<Head> {
        let there = ioctl_fionread(&self.socket)?;
        if there < HEADER as u64 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = [0; HEADER + 8];
        let (_, got) = recv(&self.socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let size = word(8);
        // A message that is too long will be refused for what its header says.
        let whole = if size as usize > MAX_MSG_SIZE { HEADER } else { HEADER + size as usize };
        if got < HEADER || there < whole as u64 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let filled = |at: usize| if got >= at + 4 && size as usize >= at + 4 - HEADER { word(at) } else { 0 };
        Ok(Head { code: word(0), words: [filled(12), filled(16)] })
    }

    /// A copy of the descriptor that comes with the message that is there. The `vhost` crate keeps the one that it takes to itself, and can't
    /// send what is sent there.
    fn attached(&self) -> Option<OwnedFd> {
        let mut space = [std::mem::MaybeUninit::uninit(); cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; HEADER];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).ok()?;
        control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
    }

    /// Waits until a reply finds room. The kernel calls a socket writable when three quarters of its buffer are free, which is more than any
    /// reply.
    async fn wait_for_room(&self) -> io::Result<()> {
        loop {
            self.socket.writable().await?;
            let asked = self.socket.try_io(Interest::WRITABLE, || {
                let mut asked = [PollFd::new(&self.socket, PollFlags::OUT)];
                match poll(&mut asked, Some(&Timespec::default()))? {
                    0 => Err(io::ErrorKind::WouldBlock.into()),
                    _ => Ok(()),
                }
            });
            match asked {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                asked => return asked,
            }
        }
    }
}

/// The channel on which a front end hears that the configuration has changed.
#[derive(Default)]
pub(crate) struct Notices(std::cell::RefCell<Option<OwnedFd>>);

impl Notices {
    fn open(&self, channel: OwnedFd) {
        self.0.replace(Some(channel));
    }

    fn close(&self) {
        self.0.replace(None);
    }

    /// Says that the configuration has changed, if the front end wanted to hear of it.
    pub(crate) fn config_changed(&self) {
        if let Some(channel) = &*self.0.borrow() {
            let mut message = [0; HEADER];
            message[..4].copy_from_slice(&u32::from(BackendReq::CONFIG_CHANGE_MSG).to_le_bytes());
            message[4..8].copy_from_slice(&VERSION.to_le_bytes());
            // A front end that left as many unread as fit into a socket will look when it reads them.
            let _ = send(channel.as_fd(), &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}
