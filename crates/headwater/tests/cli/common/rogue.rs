//! Servers that don't speak NBD as they should.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

/// What a rogue does with a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rogue {
    /// Closes it.
    Closes,
    /// Sends what is no NBD.
    Garbage,
    /// Greets properly, then sends garbage.
    GarbageLater,
    /// Agrees on an export, and answers each request with garbage.
    GarbageReplies,
}

/// Starts one and gives its URI. It ends with the test.
pub(crate) fn start(rogue: Rogue) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let uri = format!("nbd://{}/disk", listener.local_addr().expect("address"));
    std::thread::spawn(move || {
        while let Ok((socket, _)) = listener.accept() {
            std::thread::spawn(move || converse(socket, rogue));
        }
    });
    uri
}

const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03";
const GARBAGE: &[u8] = &[0xA5; 4096];

fn converse(mut socket: TcpStream, rogue: Rogue) -> Option<()> {
    match rogue {
        Rogue::Closes => return None,
        Rogue::Garbage => return socket.write_all(GARBAGE).ok(),
        _ => socket.write_all(GREETING).ok()?,
    }
    socket.read_exact(&mut [0; 4]).ok()?;
    loop {
        let mut head = [0; 16];
        socket.read_exact(&mut head).ok()?;
        let option = u32::from_be_bytes(head[8..12].try_into().ok()?);
        let len = u32::from_be_bytes(head[12..16].try_into().ok()?);
        let mut data = vec![0; len as usize];
        socket.read_exact(&mut data).ok()?;
        if matches!(rogue, Rogue::GarbageLater) {
            return socket.write_all(GARBAGE).ok();
        }
        let reply = |kind: u32, data: &[u8]| {
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            bytes
        };
        if option != 7 {
            // Structured replies and contexts are not supported.
            socket.write_all(&reply(0x8000_0001, &[])).ok()?;
            continue;
        }
        let mut export = vec![0, 0];
        export.extend((1u64 << 24).to_be_bytes());
        export.extend(0x0001u16.to_be_bytes());
        socket.write_all(&reply(3, &export)).ok()?;
        socket.write_all(&reply(1, &[])).ok()?;
        break;
    }
    loop {
        let mut request = [0; 28];
        socket.read_exact(&mut request).ok()?;
        socket.write_all(GARBAGE).ok()?;
    }
}
