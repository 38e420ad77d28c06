//! Packets between the two processes: a few bytes, and descriptors that go with them.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Most descriptors of a packet.
const MOST_DESCRIPTORS: usize = 4;

/// Sends one packet on a socket that keeps packets apart (`SOCK_SEQPACKET`), without waiting for room.
///
/// # Errors
/// `InvalidInput` for more than four descriptors, `BrokenPipe` if the other end is gone, `WouldBlock` if there is no room.
pub fn send_packet(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fits = descriptors.len() <= MOST_DESCRIPTORS;
    if !fits || !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?;
    Ok(())
}

/// Takes the next packet, of at most `most` bytes; none when the other end is gone. Waits for it, unless the socket was told not to.
///
/// # Errors
/// `InvalidData` if it is longer than that, or brings more descriptors than fit.
pub fn receive_packet(socket: impl AsFd, most: usize) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; most];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let descriptors: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet is longer than it may be"));
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(received.bytes);
    Ok(Some((bytes, descriptors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::io::Read;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn bytes_and_descriptors_arrive_together() {
        let (a, b) = pair();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send_packet(&a, b"one", &[writer.as_fd()]).unwrap();
        send_packet(&a, b"two", &[]).unwrap();
        drop(writer);
        let (bytes, descriptors) = receive_packet(&b, 16).unwrap().unwrap();
        assert_eq!((&bytes[..], descriptors.len()), (&b"one"[..], 1));
        assert_eq!(receive_packet(&b, 16).unwrap().unwrap().0, b"two");
        drop(descriptors);
        assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0, "it was the last copy");
        drop(a);
        assert!(receive_packet(&b, 16).unwrap().is_none());
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_leaks_nothing() {
        let (a, b) = pair();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send_packet(&a, &[1; 17], &[writer.as_fd()]).unwrap();
        drop(writer);
        assert_eq!(receive_packet(&b, 16).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0, "a descriptor was left open");
        let many = [a.as_fd(); MOST_DESCRIPTORS + 1];
        assert_eq!(send_packet(&a, b"x", &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
