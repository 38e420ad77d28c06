//! Drives the negotiation of `headwater-nbd` over a socket.

use std::future::poll_fn;
use std::io::{self, IoSlice};

use headwater_block::Error;
use headwater_nbd::{ClientChoice, ProtocolError, ServerHandshake, ServerOutcome, ServerRules, Step};
use headwater_tls::TlsCredentials;

use super::exports::{Exports, Seat};
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
    /// The client does not start TLS, or not acceptably.
    NoTls(Error),
    /// The client takes too long.
    TooSlow,
}

/// A client that has chosen an export.
pub(crate) struct Negotiated {
    pub(crate) socket: Socket,
    pub(crate) seat: Seat,
    pub(crate) choice: ClientChoice,
    /// What the client has sent beyond the negotiation.
    pub(crate) received: Vec<u8>,
    /// The answer that ends the negotiation, which is still to be sent. From its choice on a client may be told to go, and that must not
    /// wait for the client to take this.
    pub(crate) answer: Vec<u8>,
}

/// Negotiates. May be dropped at any time.
pub(crate) async fn negotiate(
    mut socket: Socket,
    exports: &Exports,
    tls: Option<&TlsCredentials>,
    empty_name_is_only_export: bool,
) -> Result<Negotiated, Failure> {
    let mut output = Vec::new();
    let rules = ServerRules { tls: tls.is_some(), empty_name_is_only_export };
    let mut handshake = ServerHandshake::new(rules, &mut output);
    let mut input = Vec::new();
    send(&mut socket, &mut output).await?;
    loop {
        match handshake.step(|| exports.infos(), &input, &mut output).map_err(Failure::CutOff)? {
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
                send(&mut socket, &mut output).await?;
                handshake = state;
            }
            Step::Done { outcome: ServerOutcome::Transmission(choice), consumed } => {
                // Nothing has happened since the choice was made.
                let seat = exports.take_seat(&choice.export.name).ok_or(Failure::Left)?;
                input.drain(..consumed);
                return Ok(Negotiated { socket, seat, choice, received: input, answer: output });
            }
            Step::Done { outcome: ServerOutcome::Closed, .. } => {
                send(&mut socket, &mut output).await?;
                return Err(Failure::Left);
            }
            Step::Done { outcome: ServerOutcome::StartTls(state), consumed } => {
                input.drain(..consumed);
                send(&mut socket, &mut output).await?;
                // Without credentials the rules don't offer it.
                let credentials = tls.ok_or(Failure::Left)?;
                socket = socket.start_tls(credentials).await.map_err(Failure::NoTls)?;
                handshake = *state;
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
    poll_fn(|cx| socket.poll_flush(cx)).await.map_err(Failure::Broken)
}
