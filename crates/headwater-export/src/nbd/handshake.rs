//! Drives the negotiation of `headwater-nbd` over a socket.

use std::future::poll_fn;
use std::io::{self, IoSlice};

use headwater_nbd::{ClientChoice, ExportInfo, ProtocolError, ServerHandshake, ServerOutcome, Step};

use super::socket::Socket;

/// How much is received at once; the haggling of an honest client fits.
const PIECE: usize = 4096;

/// Why a connection did not get beyond negotiation.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The client left.
    Left,
    /// The client broke the protocol.
    CutOff(ProtocolError),
    /// The connection failed.
    Broken(io::Error),
}

/// Negotiates. Returns what the client chose, and what it has sent beyond that. May be dropped at any time.
pub(crate) async fn negotiate(
    socket: &mut Socket,
    exports: Vec<ExportInfo>,
) -> Result<(ClientChoice, Vec<u8>), Failure> {
    let mut output = Vec::new();
    let mut handshake = ServerHandshake::new(exports, &mut output);
    let mut input = Vec::new();
    send(socket, &mut output).await?;
    loop {
        match handshake.step(&input, &mut output).map_err(Failure::CutOff)? {
            Step::More { state, .. } => {
                let known = input.len();
                input.resize(known + PIECE, 0);
                let received = poll_fn(|cx| socket.poll_read(cx, &mut input[known..])).await;
                let received = received.map_err(Failure::Broken)?;
                input.truncate(known + received);
                if received == 0 {
                    return Err(Failure::Left);
                }
                handshake = state;
            }
            Step::Next { state, consumed } => {
                input.drain(..consumed);
                send(socket, &mut output).await?;
                handshake = state;
            }
            Step::Done { outcome, consumed } => {
                input.drain(..consumed);
                send(socket, &mut output).await?;
                return match outcome {
                    ServerOutcome::Transmission(choice) => Ok((choice, input)),
                    ServerOutcome::Closed => Err(Failure::Left),
                };
            }
        }
    }
}

async fn send(socket: &mut Socket, output: &mut Vec<u8>) -> Result<(), Failure> {
    let mut sent = 0;
    while sent < output.len() {
        let rest = [IoSlice::new(&output[sent..])];
        match poll_fn(|cx| socket.poll_write(cx, &rest)).await {
            Ok(0) => return Err(Failure::Broken(io::ErrorKind::WriteZero.into())),
            Ok(count) => sent += count,
            Err(error) => return Err(Failure::Broken(error)),
        }
    }
    output.clear();
    Ok(())
}
