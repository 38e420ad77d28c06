//! One HTTP/1.1 connection: requests go to the server as they are, answers come back as the rules have it.

use crate::answers::Answer;
use crate::link::{Entrance, PIECE, Parcel, way};
use crate::proxy::Shared;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader,
};
use tokio::net::TcpStream;

/// The longest head, in bytes.
const MOST_HEAD: usize = 64 << 10;

/// How long a body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    Bytes(u64),
    Chunked,
    /// As long as the connection lasts.
    ToTheEnd,
}

/// The lines of a head, without their ends.
struct Head(Vec<String>);

impl Head {
    /// Reads a head; `None` if there is no more.
    async fn read(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<Self>> {
        let mut lines = Vec::new();
        let mut all = 0;
        loop {
            let mut line = String::new();
            let len = from.read_line(&mut line).await?;
            all += len;
            if len == 0 || all > MOST_HEAD {
                return if all == 0 { Ok(None) } else { Err(io::ErrorKind::InvalidData.into()) };
            }
            match line.trim_end() {
                "" => return Ok(Some(Self(lines))),
                line => lines.push(line.to_owned()),
            }
        }
    }

    fn first(&self) -> &str {
        self.0.first().map_or("", String::as_str)
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    fn set(&mut self, name: &str, value: &str) {
        self.0.retain(|line| !line.split_once(':').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name)));
        self.0.push(format!("{name}: {value}"));
    }

    fn length(&self) -> Option<u64> {
        self.get("Content-Length")?.parse().ok()
    }

    fn is_chunked(&self) -> bool {
        self.get("Transfer-Encoding").is_some_and(|value| value.to_ascii_lowercase().contains("chunked"))
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.0.join("\r\n").into_bytes();
        bytes.extend_from_slice(b"\r\n\r\n");
        bytes
    }

    fn body_of_request(&self) -> Body {
        if self.is_chunked() { Body::Chunked } else { Body::Bytes(self.length().unwrap_or(0)) }
    }

    fn body_of_answer(&self, method: &str) -> Body {
        let status = self.first().split(' ').nth(1).unwrap_or_default();
        match (method, status) {
            ("HEAD", _) | (_, "204" | "304") => Body::Bytes(0),
            _ if status.starts_with('1') => Body::Bytes(0),
            _ if self.is_chunked() => Body::Chunked,
            _ => self.length().map_or(Body::ToTheEnd, Body::Bytes),
        }
    }
}

/// Serves a client with what the server says, and with what the rules say instead.
pub(crate) async fn pass(
    shared: &Arc<Shared>,
    client: TcpStream,
    server: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = tokio::io::split(server);
    let (entrance, exit) = way(shared);
    let talk = Talk {
        shared: shared.clone(),
        client: BufReader::new(from_client),
        server: BufReader::with_capacity(PIECE, from_server),
        to_server,
        entrance,
    };
    tokio::try_join!(talk.run(), exit.deliver(to_client)).map(drop)
}

struct Talk<Client, Server, ToServer> {
    shared: Arc<Shared>,
    client: Client,
    server: Server,
    to_server: ToServer,
    entrance: Entrance,
}

impl<Client, Server, ToServer> Talk<Client, Server, ToServer>
where
    Client: AsyncBufRead + Unpin,
    Server: AsyncBufRead + Unpin,
    ToServer: AsyncWrite + Unpin,
{
    async fn run(mut self) -> io::Result<()> {
        while let Some(request) = Head::read(&mut self.client).await? {
            self.shared.flows().await;
            let answer = self.shared.next_answer();
            if let Some(Answer::Status { code, retry_after }) = answer {
                relay(&mut self.client, request.body_of_request(), async |_| Ok(())).await?;
                self.say(code, retry_after).await?;
                continue;
            }
            self.to_server.write_all(&request.bytes()).await?;
            let to_server = &mut self.to_server;
            relay(&mut self.client, request.body_of_request(), async |bytes| {
                to_server.write_all(&bytes).await
            })
            .await?;
            self.to_server.flush().await?;
            let method = request.first().split(' ').next().unwrap_or_default().to_owned();
            if !self.answer(&method, answer).await? {
                break;
            }
        }
        Ok(())
    }

    /// Answers in the server's place.
    async fn say(&mut self, code: u16, retry_after: Option<u64>) -> io::Result<()> {
        let mut head = Head(vec![format!("HTTP/1.1 {code} Told To")]);
        head.set("Content-Length", "0");
        if let Some(seconds) = retry_after {
            head.set("Retry-After", &seconds.to_string());
        }
        self.entrance.send(Parcel { bytes: head.bytes(), may_rot: false }).await
    }

    /// Passes an answer on. False if the connection ends with it.
    async fn answer(&mut self, method: &str, answer: Option<Answer>) -> io::Result<bool> {
        let mut head = loop {
            let Some(head) = Head::read(&mut self.server).await? else {
                return Ok(false);
            };
            // The interim answers pass.
            if !head.first().starts_with("HTTP/1.1 1") {
                break head;
            }
            self.entrance.send(Parcel { bytes: head.bytes(), may_rot: false }).await?;
        };
        let body = head.body_of_answer(method);
        // Only a length that is known can be wrong.
        let mut lies = false;
        match &answer {
            Some(Answer::Late(time)) => tokio::time::sleep(*time).await,
            Some(Answer::Etag(etag)) => head.set("ETag", etag),
            Some(Answer::LengthOff(by)) => {
                if let Some(length) = head.length() {
                    head.set("Content-Length", &length.saturating_add_signed(*by).to_string());
                    lies = true;
                }
            }
            Some(Answer::RangeOff(by)) => {
                if let Some(shifted) = head.get("Content-Range").and_then(|range| shift(range, *by)) {
                    head.set("Content-Range", &shifted);
                }
            }
            _ => {}
        }
        self.entrance.send(Parcel { bytes: head.bytes(), may_rot: false }).await?;
        let middle = if let Body::Bytes(length) = body { length / 2 } else { 0 };
        let mut passed = 0;
        let (entrance, shared) = (&mut self.entrance, &self.shared);
        let relayed = relay(&mut self.server, body, async |mut bytes| {
            let range = passed..passed + bytes.len() as u64;
            passed = range.end;
            match &answer {
                Some(Answer::CutBody(after)) if range.end > *after => {
                    bytes.truncate(usize::try_from(after.saturating_sub(range.start)).unwrap_or(0));
                    entrance.send(Parcel { bytes, may_rot: true }).await?;
                    // What was sent arrives before the end.
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Some(Answer::StallBody(after)) if range.contains(after) => {
                    let rest = bytes.split_off(usize::try_from(*after - range.start).unwrap_or(0));
                    entrance.send(Parcel { bytes, may_rot: true }).await?;
                    shared.healed().await;
                    return entrance.send(Parcel { bytes: rest, may_rot: true }).await;
                }
                Some(Answer::Trickle(rate)) => {
                    for byte in bytes {
                        tokio::time::sleep(
                            Duration::from_secs(1) / u32::try_from((*rate).max(1)).unwrap_or(u32::MAX),
                        )
                        .await;
                        entrance.send(Parcel { bytes: vec![byte], may_rot: true }).await?;
                    }
                    return Ok(());
                }
                Some(Answer::Corrupt) if range.contains(&middle) => {
                    bytes[(middle - range.start) as usize] ^= 1;
                }
                _ => {}
            }
            entrance.send(Parcel { bytes, may_rot: true }).await
        })
        .await;
        match relayed {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
            Ok(()) => Ok(!lies && body != Body::ToTheEnd),
        }
    }
}

/// `bytes 5-9/20` with another beginning.
fn shift(range: &str, by: i64) -> Option<String> {
    let (start, rest) = range.strip_prefix("bytes ")?.split_once('-')?;
    let start = start.parse::<u64>().ok()?.saturating_add_signed(by);
    Some(format!("bytes {start}-{rest}"))
}

/// Reads a body and hands it on piece by piece, with its framing.
async fn relay(
    from: &mut (impl AsyncBufRead + Unpin),
    body: Body,
    mut to: impl AsyncFnMut(Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    match body {
        Body::Bytes(length) => relay_bytes(from, length, &mut to).await,
        Body::ToTheEnd => {
            let mut piece = vec![0; PIECE];
            loop {
                match from.read(&mut piece).await? {
                    0 => return Ok(()),
                    len => to(piece[..len].to_vec()).await?,
                }
            }
        }
        Body::Chunked => loop {
            let line = read_line(from).await?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = u64::from_str_radix(size, 16).map_err(|_| io::ErrorKind::InvalidData)?;
            to(line.into_bytes()).await?;
            if size == 0 {
                // Trailers, up to the empty line.
                loop {
                    let line = read_line(from).await?;
                    let last = line.trim_end().is_empty();
                    to(line.into_bytes()).await?;
                    if last {
                        return Ok(());
                    }
                }
            }
            relay_bytes(from, size + 2, &mut to).await?;
        },
    }
}

async fn read_line(from: &mut (impl AsyncBufRead + Unpin)) -> io::Result<String> {
    let mut line = String::new();
    match from.read_line(&mut line).await? {
        0 => Err(io::ErrorKind::InvalidData.into()),
        _ => Ok(line),
    }
}

async fn relay_bytes(
    from: &mut (impl AsyncBufRead + Unpin),
    mut left: u64,
    to: &mut impl AsyncFnMut(Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        let len = from.read(&mut piece[..most]).await?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= len as u64;
        to(piece[..len].to_vec()).await?;
    }
    Ok(())
}
