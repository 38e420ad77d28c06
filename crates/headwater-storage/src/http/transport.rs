//! Connections to HTTP servers: TCP, TLS, a bound on how many there are, and those that are kept for the next request.

use super::HttpOptions;
use super::answer::Failure;
use super::url::Target;
use crate::dial::dial;
use bytes::Bytes;
use headwater_block::{Error, ErrorKind, Result};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::lookup_host;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;

type Sender = SendRequest<Full<Bytes>>;

/// The connections of one node.
pub(crate) struct Transport {
    options: HttpOptions,
    tls: OnceCell<TlsConnector>,
    free: Cell<u32>,
    connected: Cell<bool>,
    waiting: RefCell<VecDeque<oneshot::Sender<Permit>>>,
    /// Connections without a request, by the host they lead to; the one used last at the end.
    idle: RefCell<Vec<(Host, Sender)>>,
}

/// How many connections are left to requests while others are opened ahead of them.
const LEFT_FREE: usize = 2;

/// What a connection leads to: TLS or not, host, port.
type Host = (bool, String, u16);

/// The right to use one connection; goes to the next who waits when it is dropped. Empty only while it is handed on.
struct Permit(Option<Rc<Transport>>);

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(transport) = self.0.take() else { return };
        loop {
            let next = transport.waiting.borrow_mut().pop_front();
            let Some(next) = next else { break };
            match next.send(Permit(Some(transport.clone()))) {
                Ok(()) => return,
                // This one doesn't wait any more.
                Err(mut back) => back.0 = None,
            }
        }
        transport.free.set(transport.free.get() + 1);
    }
}

/// A response whose body is still to be read.
pub(crate) struct Exchange {
    pub(crate) response: Response<Incoming>,
    held: Held,
}

/// A connection whose response is still to be read. Closes it when it is dropped.
pub(crate) struct Held {
    host: Host,
    sender: Sender,
    permit: Permit,
}

impl Exchange {
    /// As [`Held::finish`].
    pub(crate) fn finish(self) {
        self.held.finish();
    }

    /// The response, for somebody else to read, and its connection.
    pub(crate) fn split(self) -> (Response<Incoming>, Held) {
        (self.response, self.held)
    }
}

impl Held {
    /// Keeps the connection for the next request. To be called when all of the body was read; otherwise the connection is closed.
    pub(crate) fn finish(self) {
        let Some(transport) = &self.permit.0 else { return };
        if !self.sender.is_closed() {
            transport.idle.borrow_mut().push((self.host, self.sender));
        }
    }
}

impl Transport {
    pub(crate) fn new(options: HttpOptions) -> Rc<Self> {
        Rc::new(Self {
            free: Cell::new(options.connections),
            options,
            connected: Cell::new(false),
            tls: OnceCell::new(),
            waiting: RefCell::default(),
            idle: RefCell::default(),
        })
    }

    async fn permit(self: &Rc<Self>) -> Permit {
        if let Some(left) = self.free.get().checked_sub(1) {
            self.free.set(left);
            return Permit(Some(self.clone()));
        }
        let (sender, receiver) = oneshot::channel();
        self.waiting.borrow_mut().push_back(sender);
        // The queue belongs to `self`, so the sender isn't dropped before it has sent.
        receiver.await.unwrap_or(Permit(None))
    }

    /// Sends the request that `make` makes and receives the head of the response. A kept connection that turns out to be closed is
    /// replaced at once: servers close them when they like.
    pub(crate) async fn exchange(
        self: &Rc<Self>,
        target: &Target,
        make: impl Fn() -> Result<Request<Full<Bytes>>>,
    ) -> Result<Exchange, Failure> {
        let permit = self.permit().await;
        let host = (target.tls, target.host.clone(), target.port);
        loop {
            let kept = self.take_idle(&host);
            let reused = kept.is_some();
            let mut sender = match kept {
                Some(sender) => sender,
                None => self.connect(target).await?,
            };
            let request = make().map_err(Failure::Fatal)?;
            let answer = async {
                sender.ready().await?;
                sender.send_request(request).await
            };
            match tokio::time::timeout(self.options.request_timeout, answer).await {
                Ok(Ok(response)) => {
                    return Ok(Exchange { response, held: Held { host, sender, permit } });
                }
                Ok(Err(e)) if reused && !e.is_parse() => {}
                Ok(Err(e)) => return Err(hyper_failure(&e, "no response")),
                Err(_) => return Err(self.too_slow("no response")),
            }
        }
    }

    /// Opens connections to `target` in the background, for requests to come. Some are left to requests that come before these are open, because a server that takes
    /// no more may let them wait.
    pub(crate) fn connect_ahead(self: &Rc<Self>, target: &Target) {
        let host: Host = (target.tls, target.host.clone(), target.port);
        let open = self.idle.borrow().len();
        let count = (self.free.get() as usize).saturating_sub(open + LEFT_FREE);
        for _ in 0..count {
            let (transport, target, host) = (self.clone(), target.clone(), host.clone());
            tokio::task::spawn_local(async move {
                let _permit = transport.permit().await;
                match transport.connect(&target).await {
                    Ok(sender) => transport.idle.borrow_mut().push((host, sender)),
                    // Whoever needs one tries again, and tells why there is none.
                    Err(_) => tracing::debug!(server = target.authority, "no connection ahead"),
                }
            });
        }
    }

    /// Whether any connection was ever made.
    pub(crate) fn has_connected(&self) -> bool {
        self.connected.get()
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        self.options.request_timeout
    }

    pub(crate) fn too_slow(&self, what: &str) -> Failure {
        let seconds = self.options.request_timeout.as_secs_f32();
        Failure::again(ErrorKind::TimedOut, format!("{what} from the server for {seconds} s"))
    }

    fn take_idle(&self, host: &Host) -> Option<Sender> {
        let mut idle = self.idle.borrow_mut();
        idle.retain(|(to, sender)| to == host && !sender.is_closed());
        idle.pop().map(|(_, sender)| sender)
    }

    async fn connect(&self, target: &Target) -> Result<Sender, Failure> {
        match tokio::time::timeout(self.options.connect_timeout, self.try_connect(target)).await {
            Ok(done) => done,
            Err(_) => {
                let seconds = self.options.connect_timeout.as_secs_f32();
                let message = format!("no connection to {} within {seconds} s", target.authority);
                Err(Failure::again(ErrorKind::TimedOut, message))
            }
        }
    }

    async fn try_connect(&self, target: &Target) -> Result<Sender, Failure> {
        let stream = async {
            let stream = dial(lookup_host((target.host.as_str(), target.port)).await?).await?;
            stream.set_nodelay(true).map(|()| stream)
        };
        let stream = stream.await.map_err(|e: std::io::Error| {
            let message = format!("cannot connect to {}: {e}", target.authority);
            Failure::again(ErrorKind::Unavailable, message)
        })?;
        self.connected.set(true);
        if !target.tls {
            return start(stream).await;
        }
        let name = ServerName::try_from(target.host.clone()).map_err(|e| {
            let message = format!("{:?} is not a host name for TLS: {e}", target.host);
            Failure::fatal(ErrorKind::InvalidInput, message)
        })?;
        let connector = self.tls().map_err(Failure::Fatal)?;
        let stream = connector.connect(name, stream).await.map_err(|e| tls_failure(target, &e))?;
        start(stream).await
    }

    /// The TLS configuration: the system's trusted roots, or those that SSL_CERT_FILE or SSL_CERT_DIR name.
    fn tls(&self) -> Result<&TlsConnector> {
        if let Some(connector) = self.tls.get() {
            return Ok(connector);
        }
        let found = rustls_native_certs::load_native_certs();
        let mut roots = rustls::RootCertStore::empty();
        let (usable, _) = roots.add_parsable_certificates(found.certs);
        if usable == 0 {
            let why = found.errors.first().map_or_else(|| "none found".to_owned(), |e| e.to_string());
            let message = format!(
                "no trusted root certificates for https ({why}); install ca-certificates or set SSL_CERT_FILE"
            );
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::new(ErrorKind::Unsupported, format!("cannot set up TLS: {e}")))?;
        let mut config = config.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(self.tls.get_or_init(|| TlsConnector::from(Arc::new(config))))
    }
}

/// Starts HTTP/1.1 on a connected stream. The task ends when the sender is dropped or the peer closes.
async fn start<S>(stream: S) -> Result<Sender, Failure>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static,
{
    let (sender, connection) =
        handshake(TokioIo::new(stream)).await.map_err(|e| hyper_failure(&e, "no HTTP connection"))?;
    tokio::task::spawn_local(async move {
        // What goes wrong is told to the request that it happens to.
        let _ = connection.await;
    });
    Ok(sender)
}

fn tls_failure(target: &Target, e: &std::io::Error) -> Failure {
    let message = format!("TLS with {} failed: {e}", target.authority);
    if e.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) {
        let remedy = "check the address, or name the authority's certificate in SSL_CERT_FILE";
        return Failure::fatal(ErrorKind::PermissionDenied, format!("{message}; {remedy}"));
    }
    Failure::again(ErrorKind::Unavailable, message)
}

/// What an error of the HTTP library means: broken rules are final, a broken connection is not.
pub(crate) fn hyper_failure(e: &hyper::Error, what: &str) -> Failure {
    let mut message = format!("{what}: {e}");
    let mut garbage = e.is_parse();
    let mut source = std::error::Error::source(e);
    while let Some(inner) = source {
        message = format!("{message}: {inner}");
        if let Some(io) = inner.downcast_ref::<std::io::Error>() {
            use std::io::ErrorKind::{InvalidData, InvalidInput};
            // A record of TLS that isn't what was sent, or an alert, says something of the way there, or of a server that ends.
            let tls = io.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
            garbage |= !tls && matches!(io.kind(), InvalidData | InvalidInput);
        }
        source = inner.source();
    }
    if garbage {
        Failure::fatal(ErrorKind::Corrupt, format!("the server breaks the rules of HTTP: {message}"))
    } else {
        Failure::again(ErrorKind::Unavailable, message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater_block::Error;
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
    use tokio::task::LocalSet;

    /// A connection that takes a request and fails then.
    struct Fails {
        error: Option<io::Error>,
        asked: bool,
        reads: Option<Waker>,
    }

    impl AsyncRead for Fails {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            _buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if self.asked
                && let Some(error) = self.error.take()
            {
                return Poll::Ready(Err(error));
            }
            self.reads = Some(cx.waker().clone());
            Poll::Pending
        }
    }

    impl AsyncWrite for Fails {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            self.asked = true;
            self.reads.take().into_iter().for_each(Waker::wake);
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn judged(error: io::Error) -> Failure {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        LocalSet::new().block_on(&runtime.unwrap(), async {
            let connection = Fails { error: Some(error), asked: false, reads: None };
            let mut sender = start(connection).await.unwrap();
            let request = Request::get("/").body(Full::default()).unwrap();
            hyper_failure(&sender.send_request(request).await.unwrap_err(), "no response")
        })
    }

    #[test]
    fn a_connection_that_breaks_is_worth_another_and_rules_that_are_broken_are_not() {
        for broken in [
            io::Error::from(io::ErrorKind::ConnectionReset),
            io::Error::new(io::ErrorKind::InvalidData, rustls::Error::DecryptError),
            io::Error::new(
                io::ErrorKind::InvalidData,
                rustls::Error::AlertReceived(rustls::AlertDescription::InternalError),
            ),
        ] {
            let failure = judged(broken);
            let again = |error: &Error| error.kind() == ErrorKind::Unavailable;
            assert!(matches!(&failure, Failure::Again(error, None) if again(error)), "{failure:?}");
        }
        let garbage = judged(io::Error::from(io::ErrorKind::InvalidData));
        assert!(
            matches!(&garbage, Failure::Fatal(error) if error.kind() == ErrorKind::Corrupt),
            "{garbage:?}"
        );
    }
}
