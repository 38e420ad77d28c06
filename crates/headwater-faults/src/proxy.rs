//! The proxy itself: its thread, its connections, and what it is told.

use crate::answers::{Answer, Rule};
use crate::http;
use crate::link::{Link, way};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::Instant;

/// Where the server is.
#[derive(Debug, Clone)]
pub enum Upstream {
    /// On TCP.
    Tcp(SocketAddr),
    /// At a Unix socket.
    Unix(PathBuf),
}

impl From<SocketAddr> for Upstream {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl From<PathBuf> for Upstream {
    fn from(path: PathBuf) -> Self {
        Self::Unix(path)
    }
}

/// What is spoken through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Something that it needn't understand (NBD, TLS).
    Plain,
    /// HTTP/1.1 in clear: [`Rule`]s count.
    Http,
}

/// A time in which the server can't be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outage {
    /// All connections are cut, and new ones refused, as if the server had ended.
    Refused,
    /// Nothing gets through, and connections stay, as if a cable had been pulled.
    Stalled,
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Connections that clients made.
    pub connections: u64,
    /// HTTP requests.
    pub requests: u64,
    /// Faults: answers that a rule hit, connections that broke, bits that were flipped.
    pub faults: u64,
    /// Bytes that clients were sent.
    pub bytes: u64,
}

/// What connections look at all the time.
#[derive(Debug, Clone, Copy, Default)]
struct State {
    link: Link,
    outage: Option<Outage>,
    /// Goes up when all connections are to be cut, and when the proxy is healed.
    cuts: u64,
    heals: u64,
    ended: bool,
}

/// What the proxy's owner and its connections share.
pub(crate) struct Shared {
    state: watch::Sender<State>,
    rules: Mutex<Vec<Rule>>,
    upstream: Upstream,
    protocol: Protocol,
    /// When what was sent so far has passed, at the rate of all connections together.
    passed_at: Mutex<Option<Instant>>,
    random: AtomicU64,
    connections: AtomicU64,
    requests: AtomicU64,
    faults: AtomicU64,
    bytes: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn link(&self) -> Link {
        self.state.borrow().link
    }

    /// A number from 0 to 1.
    pub(crate) fn chance(&self) -> f64 {
        let n = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (n ^ (n >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed >> 40) as f64 / (1_u64 << 24) as f64
    }

    /// Completes while something gets through.
    pub(crate) async fn flows(&self) {
        // The sender is ours.
        let _ = self.state.subscribe().wait_for(|state| state.outage != Some(Outage::Stalled)).await;
    }

    /// Completes when the proxy is healed.
    pub(crate) async fn healed(&self) {
        let before = self.state.borrow().heals;
        let _ = self.state.subscribe().wait_for(|state| state.heals != before).await;
    }

    /// Waits until so many more bytes have passed at a rate that all connections share.
    pub(crate) async fn wait_for_turn(&self, len: usize, rate: NonZeroU64) {
        let passed = {
            let mut passed_at = lock(&self.passed_at);
            let begins = passed_at.map_or_else(Instant::now, |at| at.max(Instant::now()));
            let passed = begins + Duration::from_secs_f64(len as f64 / rate.get() as f64);
            *passed_at = Some(passed);
            passed
        };
        tokio::time::sleep_until(passed).await;
    }

    /// What happens to the answer to the next request.
    pub(crate) fn next_answer(&self) -> Option<Answer> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut rules = lock(&self.rules);
        let answer = rules.iter_mut().find_map(|rule| rule.hits().then(|| rule.answer.clone()));
        if answer.is_some() {
            self.count_fault();
        }
        answer
    }

    pub(crate) fn count_fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn count_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn is_refusing(&self) -> bool {
        self.state.borrow().outage == Some(Outage::Refused)
    }
}

/// See the crate. It listens on a port of 127.0.0.1 that stays its own, also while connections are refused.
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    thread: Option<JoinHandle<()>>,
}

impl FaultProxy {
    /// Starts a proxy to a server, which need not be there yet.
    ///
    /// # Errors
    /// If there is no port or no thread to be had.
    pub fn start(upstream: impl Into<Upstream>, protocol: Protocol) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: watch::Sender::new(State::default()),
            rules: Mutex::default(),
            upstream: upstream.into(),
            protocol,
            passed_at: Mutex::default(),
            random: AtomicU64::new(1),
            connections: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let (sender, receiver) = mpsc::channel();
        let inner = shared.clone();
        let thread = std::thread::Builder::new().name("fault proxy".into()).spawn(move || {
            let started =
                tokio::runtime::Builder::new_current_thread().enable_all().build().and_then(|runtime| {
                    // It stays bound for as long as the proxy lives, and never listens: it keeps the port.
                    let keeper = runtime.block_on(async { bind((Ipv4Addr::LOCALHOST, 0).into()) })?;
                    let address = keeper.local_addr()?;
                    let listener = runtime.block_on(async { bind(address)?.listen(128) })?;
                    Ok((runtime, keeper, address, listener))
                });
            match started {
                Ok((runtime, _keeper, address, listener)) => {
                    let told = sender.send(Ok((address, runtime.handle().clone())));
                    if told.is_ok() {
                        tokio::task::LocalSet::new().block_on(&runtime, accept(&inner, address, listener));
                    }
                }
                Err(error) => drop(sender.send(Err(error))),
            }
        })?;
        let (address, runtime) = receiver.recv().map_err(|_| io::ErrorKind::BrokenPipe)??;
        Ok(Self { address, shared, runtime, thread: Some(thread) })
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How the way behaves from now on.
    pub fn set_link(&self, link: Link) {
        self.shared.state.send_modify(|state| state.link = link);
    }

    /// Adds a rule for answers, behind the others: the first that hits counts.
    pub fn add(&self, rule: Rule) {
        lock(&self.shared.rules).push(rule);
    }

    /// The server can't be reached from now on.
    pub fn begin(&self, outage: Outage) {
        self.shared.state.send_modify(|state| {
            state.outage = Some(outage);
            if outage == Outage::Refused {
                state.cuts += 1;
            }
        });
    }

    /// It can be reached again.
    pub fn end_outage(&self) {
        self.shared.state.send_modify(|state| state.outage = None);
    }

    /// It can't be reached for a time from now on. Returns at once.
    pub fn begin_for(&self, outage: Outage, time: Duration) {
        self.begin(outage);
        let shared = self.shared.clone();
        self.runtime.spawn(async move {
            tokio::time::sleep(time).await;
            shared.state.send_modify(|state| state.outage = None);
        });
    }

    /// Cuts all connections that there are.
    pub fn cut(&self) {
        self.shared.count_fault();
        self.shared.state.send_modify(|state| state.cuts += 1);
    }

    /// Nothing is wrong any more: no outage, no rule, a perfect way. Bodies that have stalled go on.
    pub fn heal(&self) {
        lock(&self.shared.rules).clear();
        self.shared.state.send_modify(|state| {
            (state.outage, state.link) = (None, Link::default());
            state.heals += 1;
        });
    }

    /// What has happened so far.
    pub fn seen(&self) -> Seen {
        let shared = &self.shared;
        Seen {
            connections: shared.connections.load(Ordering::Relaxed),
            requests: shared.requests.load(Ordering::Relaxed),
            faults: shared.faults.load(Ordering::Relaxed),
            bytes: shared.bytes.load(Ordering::Relaxed),
        }
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.state.send_modify(|state| state.ended = true);
        if let Some(thread) = self.thread.take() {
            // If it failed, its connections have ended, which is what is wanted.
            let _ = thread.join();
        }
    }
}

/// A socket on an address that others of this process may have as well.
fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Takes connections until the proxy ends.
async fn accept(shared: &Arc<Shared>, address: SocketAddr, listener: TcpListener) {
    let mut listener = Some(listener);
    let mut state = shared.state.subscribe();
    loop {
        if state.borrow_and_update().ended {
            return;
        }
        if shared.is_refusing() {
            listener = None;
        } else if listener.is_none() {
            listener = bind(address).and_then(|socket| socket.listen(128)).ok();
        }
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = state.changed() => {}
            accepted = accepted => if let Ok((client, _)) = accepted {
                shared.connections.fetch_add(1, Ordering::Relaxed);
                tokio::task::spawn_local(until_cut(shared.clone(), client));
            }
        }
    }
}

/// Serves a connection until it ends or is cut.
async fn until_cut(shared: Arc<Shared>, client: TcpStream) {
    let mut state = shared.state.subscribe();
    let before = state.borrow().cuts;
    tokio::select! {
        biased;
        _ = state.wait_for(|state| state.cuts != before || state.ended) => {}
        // How it ended, the client sees.
        _ = serve(&shared, client) => {}
    }
}

async fn serve(shared: &Arc<Shared>, client: TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    shared.flows().await;
    match &shared.upstream {
        Upstream::Tcp(address) => {
            let server = TcpStream::connect(address).await?;
            server.set_nodelay(true)?;
            pass(shared, client, server).await
        }
        Upstream::Unix(path) => pass(shared, client, UnixStream::connect(path).await?).await,
    }
}

async fn pass(
    shared: &Arc<Shared>,
    client: TcpStream,
    server: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    if shared.protocol == Protocol::Http {
        return http::pass(shared, client, server).await;
    }
    let (mut from_client, to_client) = client.into_split();
    let (from_server, mut to_server) = tokio::io::split(server);
    let (entrance, exit) = way(shared);
    let up = async {
        let mut piece = vec![0; crate::link::PIECE];
        loop {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let len = from_client.read(&mut piece).await?;
            shared.flows().await;
            if len == 0 {
                return to_server.shutdown().await;
            }
            to_server.write_all(&piece[..len]).await?;
        }
    };
    tokio::try_join!(up, entrance.send_all(from_server), exit.deliver(to_client)).map(drop)
}
