//! The broker's process: it has the monitors, and opens files.

use super::desk::{self, Desk};
use super::{DETACH, words};
use crate::daemon::background;
use crate::daemon::chardev::{Backend, Peer, standard_input};
use crate::daemon::options::{Line, Setting};
use crate::failure::{Failure, Outcome};
use crate::runtime;
use headwater_image::open_gate::{self, Location, Role, Trust};
use headwater_image::qcow2::header::Header;
use headwater_qmp::{Reader, opts};
use headwater_sandbox::{Broker, Grants, Named, Names, Word, receive_packet};
use serde_json::Value;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

/// The grants, which monitors add to and the thread that opens files looks into.
type Shared = Arc<Mutex<Grants>>;

fn hear(grants: &Shared, words: impl IntoIterator<Item = Word>) {
    // Each word is one step, so that nothing is half done.
    let mut grants = grants.lock().unwrap_or_else(PoisonError::into_inner);
    words.into_iter().for_each(|word| grants.hear(word));
}

/// Runs the broker, with its ends of the desks, and ends the process.
pub(super) fn run(broker: Broker, line: &Line, desks: Vec<OwnedFd>) -> ! {
    let outcome = serve(broker, line, desks);
    if let Err(Failure { message: Some(message), .. }) = &outcome {
        tracing::error!("{message}");
    }
    std::process::exit(i32::from(outcome.is_err()));
}

fn serve(broker: Broker, line: &Line, desks: Vec<OwnedFd>) -> Outcome {
    let cannot = |err: io::Error| Failure::new(format!("cannot start the broker: {err}"));
    // Where the directory is gone, relative names lead nowhere, as they do without a broker.
    let here = std::env::current_dir().unwrap_or_else(|_| "/proc/self/cwd".into());
    let mut grants = Grants::new(here);
    said_at_the_start(line).into_iter().for_each(|word| grants.hear(word));
    let grants = Arc::new(Mutex::new(grants));
    let life = broker.clone_life().map_err(cannot)?;
    let names = names(super::super::trust(&line.allow_backing));
    let for_files = grants.clone();
    std::thread::Builder::new()
        .name("headwater-open".into())
        .spawn(move || {
            let _last = EndsProcess;
            broker.serve(for_files, names);
        })
        .map_err(cannot)?;
    let chardevs: Vec<opts::Chardev> = line
        .settings
        .iter()
        .filter_map(|setting| match setting {
            Setting::Chardev(asked, _) => Some(asked.clone()),
            _ => None,
        })
        .collect();
    runtime::run(async move {
        let attending: Vec<_> = chardevs
            .into_iter()
            .zip(desks)
            .map(|(asked, socket)| tokio::task::spawn_local(attend(socket, asked, grants.clone())))
            .collect();
        accompany(life).await.map_err(cannot)?;
        // The data plane is gone, so that each of them sees the end of its desk.
        for device in attending {
            let _ = device.await;
        }
        // Look-ups of hosts that nobody waits for may still run.
        std::process::exit(0)
    })
}

/// A broker that opens no files any more ends, so that the data plane learns of it.
struct EndsProcess;

impl Drop for EndsProcess {
    fn drop(&mut self) {
        std::process::exit(1);
    }
}

/// Stays until the data plane is gone.
async fn accompany(life: OwnedFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&life, true)?;
    let life = desk::unix_stream(life)?;
    while let Ok(Some((word, _))) =
        life.async_io(Interest::READABLE, || receive_packet(&life, DETACH.len())).await
    {
        if word == DETACH {
            background::leave_terminal();
        }
    }
    Ok(())
}

/// What the command line names.
fn said_at_the_start(line: &Line) -> Vec<Word> {
    let mut said: Vec<Word> = line.allow_backing.iter().flat_map(|name| words::of_allowed(name)).collect();
    said.extend(line.state_dir.iter().map(|path| Word::State(path.into())));
    said.extend(line.cache_dir.iter().map(|path| Word::State(path.into())));
    if let Some(path) = &line.pidfile {
        said.extend([Word::Own(path.into()), Word::Own(background::new_name(path).into())]);
    }
    for setting in &line.settings {
        if let Setting::Blockdev(options, _)
        | Setting::Object(options, _)
        | Setting::NbdServer(options, _)
        | Setting::Export(options, _) = setting
        {
            said.extend(words::of_options(options));
        }
    }
    // Where the user has certificates of servers.
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    said.extend(variable("SSL_CERT_FILE").map(|file| Word::File(file.into())));
    let directories = variable("SSL_CERT_DIR");
    said.extend(directories.iter().flat_map(std::env::split_paths).map(Word::Directory));
    said
}

/// Reads headers of images, and lets them name what [`open_gate`] lets them.
fn names(trust: Trust) -> Names {
    Box::new(move |file, path| {
        let header = match read_header(file, path) {
            Ok(Some(header)) => header,
            Ok(None) => return Vec::new(),
            Err(err) => {
                // The data plane will say so.
                tracing::debug!("{}: {err}", path.display());
                return Vec::new();
            }
        };
        let image = Location::Path(path.to_owned());
        let headed = header.backing_format().is_none_or(|format| format != "raw");
        let data_file = header.data_file_name().filter(|_| header.has_data_file());
        let named = [(header.backing_name, Role::Backing, headed), (data_file, Role::DataFile, false)];
        named
            .into_iter()
            .filter_map(|(name, role, header)| match open_gate::admit(&image, &name?, role, &trust) {
                Ok(Location::Path(path)) => Some(Named { path, header }),
                // What may not be followed the data plane will find out as well.
                _ => None,
            })
            .collect()
    })
}

/// How a qcow2 image begins.
const MAGIC: &[u8] = b"QFI\xfb";

/// The qcow2 header of an image; none if it has none.
fn read_header(file: &File, path: &Path) -> headwater_block::Result<Option<Header>> {
    let name = path.display().to_string();
    let failed = |err| headwater_block::Error::from_io(err, format_args!("read the header of {name}"));
    let mut bytes = vec![0; 512];
    let read = read_start(file, &mut bytes).map_err(failed)?;
    if read < MAGIC.len() || !bytes.starts_with(MAGIC) {
        return Ok(None);
    }
    // The name lies in the first cluster, which is 2 MiB at most; what a file lacks of it is zero.
    let cluster_bits = u32::from_be_bytes([bytes[20], bytes[21], bytes[22], bytes[23]]);
    bytes.resize(1 << cluster_bits.clamp(9, 21), 0);
    read_start(file, &mut bytes).map_err(failed)?;
    Header::parse(&bytes, &name).map(Some)
}

/// Reads as much of the start as there is.
fn read_start(file: &File, bytes: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(done)
}

/// Has one character device, and hands its connections to the data plane, until that is gone.
async fn attend(socket: OwnedFd, asked: opts::Chardev, grants: Shared) {
    match answer(socket, &asked, &grants).await {
        // It is gone, and so is its need.
        Err(err) if matches!(err.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {}
        Err(err) => tracing::error!("chardev {}: {err}", asked.id),
        Ok(()) => {}
    }
}

async fn answer(socket: OwnedFd, asked: &opts::Chardev, grants: &Shared) -> io::Result<()> {
    let desk = Desk::new(socket)?;
    let mut backend = None;
    loop {
        let Some((question, _)) = desk.receive().await? else { return Ok(()) };
        match (&question[..], &backend) {
            (desk::OPEN, None) => {
                let Some(opened) = unless_gone(&desk, Backend::open(asked)).await else { return Ok(()) };
                let (kind, text) = match &opened {
                    Ok(opened) => (desk::OPENED, opened.filename()),
                    Err(refusal) => (desk::REFUSED, refusal.desc.clone()),
                };
                backend = opened.ok();
                if let Some(port) = backend.as_ref().and_then(Backend::port) {
                    grants.lock().unwrap_or_else(PoisonError::into_inner).keep_from(port);
                }
                desk.send(&[&[kind][..], text.as_bytes()].concat(), &[]).await?;
            }
            (desk::NEXT, Some(backend)) => {
                let Some(peer) = unless_gone(&desk, next_peer(backend)).await else { return Ok(()) };
                hand_over(&desk, peer, grants).await?;
            }
            // It asks for what no data plane of ours asks for.
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// What `work` gives; none if the data plane goes meanwhile. It says nothing while it waits for an answer.
async fn unless_gone<T>(desk: &Desk, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        _ = desk.receive() => None,
        done = work => Some(done),
    }
}

/// The next peer that isn't one of the two processes themselves: the data plane would be its own operator.
async fn next_peer(backend: &Backend) -> Option<Peer> {
    loop {
        let peer = backend.peer().await?;
        let Peer::Unix(stream) = &peer else { return Some(peer) };
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let ours = [Some(rustix::process::getpid()), rustix::process::getppid()];
        if pid.is_none_or(|pid| !ours.contains(&rustix::process::Pid::from_raw(pid))) {
            return Some(peer);
        }
        tracing::error!("the data plane tried to reach a monitor");
    }
}

/// Gives the data plane a connection's way out, and what was read of its way in.
async fn hand_over(desk: &Desk, peer: Option<Peer>, grants: &Shared) -> io::Result<()> {
    let (pass_on, passed_on) = std::os::unix::net::UnixStream::pair()?;
    for end in [&pass_on, &passed_on] {
        end.set_nonblocking(true)?;
    }
    match peer {
        Some(Peer::Unix(stream)) => {
            desk.send(desk::UNIX, &[passed_on.as_fd(), stream.as_fd()]).await?;
            relay(stream, pass_on, grants)
        }
        Some(Peer::Tcp(stream)) => {
            desk.send(desk::TCP, &[passed_on.as_fd(), stream.as_fd()]).await?;
            relay(stream, pass_on, grants)
        }
        Some(Peer::Stdio) => {
            let input = standard_input()?;
            desk.send(desk::STDIO, &[passed_on.as_fd()]).await?;
            relay(input, pass_on, grants)
        }
        None => desk.send(desk::NONE, &[]).await,
    }
}

fn relay(
    from: impl AsyncRead + Unpin + 'static,
    to: std::os::unix::net::UnixStream,
    grants: &Shared,
) -> io::Result<()> {
    let to = UnixStream::from_std(to)?;
    let grants = grants.clone();
    tokio::task::spawn_local(async move {
        let (mut back, mut to) = to.into_split();
        let pass_on = listen(from, &mut to, &grants);
        tokio::select! {
            // The data plane says nothing here: this is the end of its end.
            _ = back.read_u8() => {}
            never = pass_on => match never {},
        }
    });
    Ok(())
}

/// Passes on what the operator says, after it was heard. Keeps the connection when there is nothing more to pass on: answers may follow.
async fn listen(
    mut from: impl AsyncRead + Unpin,
    to: &mut tokio::net::unix::OwnedWriteHalf,
    grants: &Shared,
) -> std::convert::Infallible {
    let mut messages = Reader::new();
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        messages.push(&bytes[..read]);
        while let Some(message) = messages.next() {
            hear_message(grants, message.ok());
        }
        if to.write_all(&bytes[..read]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
    std::future::pending().await
}

fn hear_message(grants: &Shared, message: Option<Value>) {
    if let Some(message) = message {
        hear(grants, words::of_value(&message));
    }
}

#[cfg(test)]
mod tests;
