//! How the crate `object_store` reaches a server: over the connections of `http::transport`.
//!
//! The crate wants futures that may move between threads, and the transport is of one thread: requests go to a task in the node's
//! `LocalSet`, and responses come back. So there is one HTTP client in the program, with one bound on connections and one way of TLS.
//!
//! Answers to requests for ranges are judged here, where their headers still are ([`super::refusal`]); the crate
//! would keep a text.

use super::refusal::{Refusal, judge};
use crate::http::answer::Failure;
use crate::http::transport::{Held, Transport};
use crate::http::{HttpOptions, Target};
use bytes::Bytes;
use futures_util::future::{Either, select};
use headwater_block::ErrorKind;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{HOST, HeaderValue, RANGE, USER_AGENT};
use hyper::{Method, Request, Response};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// How long connecting to a service that gives a machine its credentials may take. It is on the machine or not there.
const METADATA_TIMEOUT: Duration = Duration::from_secs(1);

/// How much of an answer that refuses is read, in bytes.
const REASON: usize = 16 << 10;

/// How large an answer about credentials may be, in bytes.
const CREDENTIALS: usize = 1 << 20;

type Answer = Result<HttpResponse, HttpError>;

/// What came of a request.
enum Got {
    /// A part of the object, whose body is still to be read.
    Part(Response<Incoming>, Held),
    /// Anything else, all of it.
    Whole(HttpResponse),
}

/// A request that waits for its answer.
struct Call {
    request: HttpRequest,
    answer: oneshot::Sender<Answer>,
}

/// Makes clients, each with connections of its own.
#[derive(Debug, Clone)]
pub(super) struct Connector {
    http: HttpOptions,
}

impl Connector {
    pub(super) fn new(http: HttpOptions) -> Self {
        Self { http }
    }

    /// What is to be given to builders along with this.
    pub(super) fn options(&self) -> ClientOptions {
        ClientOptions::new().with_connect_timeout(self.http.connect_timeout).with_allow_http(true)
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let timeout = |options: &ClientOptions| options.get_config_value(&ClientConfigKey::ConnectTimeout);
        let mut http = self.http.clone();
        if timeout(options) != timeout(&self.options()) {
            http.connect_timeout = METADATA_TIMEOUT;
        }
        let (calls, mut waiting) = mpsc::unbounded_channel();
        let transport = Transport::new(http);
        // Ends with the client.
        tokio::task::spawn_local(async move {
            while let Some(call) = waiting.recv().await {
                tokio::task::spawn_local(carry_out(transport.clone(), call));
            }
        });
        Ok(HttpClient::new(Service { calls }))
    }
}

#[derive(Debug)]
struct Service {
    calls: mpsc::UnboundedSender<Call>,
}

impl HttpService for Service {
    fn call<'life, 'call>(
        &'life self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Answer> + Send + 'call>>
    where
        'life: 'call,
        Self: 'call,
    {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            let gone = |_| HttpError::new(HttpErrorKind::Interrupted, std::io::Error::other("it was closed"));
            self.calls.send(Call { request, answer }).map_err(|_| gone(()))?;
            answered.await.map_err(|_| gone(()))?
        })
    }
}

/// Gets the answer to a request, and stays until its body was read. A caller that goes takes the connection with it.
async fn carry_out(transport: Rc<Transport>, call: Call) {
    let Call { request, mut answer } = call;
    let done = {
        let exchange = std::pin::pin!(exchange(&transport, request));
        match select(exchange, std::pin::pin!(answer.closed())).await {
            Either::Left((done, _)) => done,
            Either::Right(_) => return,
        }
    };
    match done {
        // Nobody may wait any more.
        Ok(Got::Whole(response)) => drop(answer.send(Ok(response))),
        Ok(Got::Part(response, held)) => {
            let (end, ended) = oneshot::channel();
            let response = response.map(|body| HttpResponseBody::new(Received { body, end: Some(end) }));
            if answer.send(Ok(response)).is_ok() && ended.await.is_ok() {
                held.finish();
            }
        }
        Err(refusal) => {
            // Nobody may wait any more.
            let _ = answer.send(Err(HttpError::new(HttpErrorKind::Unknown, refusal)));
        }
    }
}

async fn exchange(transport: &Rc<Transport>, request: HttpRequest) -> Result<Got, Refusal> {
    let (parts, body) = request.into_parts();
    // Everything else is about credentials, but for the HEAD of an empty object.
    let range = parts.headers.contains_key(RANGE);
    let about_credentials = !range && parts.method != Method::HEAD;
    let refuse = |failure| Refusal { failure, about_credentials, answered: false, empty: false };
    let target = Target::parse(&parts.uri.to_string()).map_err(|err| refuse(Failure::Fatal(err)))?;
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let make = || {
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = target.path.parse().map_err(|err| target.bad(&err))?;
        *request.headers_mut() = parts.headers.clone();
        let host = HeaderValue::from_str(&target.authority).map_err(|err| target.bad(&err))?;
        request.headers_mut().insert(HOST, host);
        let agent = HeaderValue::from_static(concat!("headwater/", env!("CARGO_PKG_VERSION")));
        request.headers_mut().insert(USER_AGENT, agent);
        Ok(request)
    };
    let (response, held) = transport.exchange(&target, make).await.map_err(refuse)?.split();
    if range && response.status() == hyper::StatusCode::PARTIAL_CONTENT {
        return Ok(Got::Part(response, held));
    }
    let (parts, body) = response.into_parts();
    if !range {
        // Read here, because the crate would wait for it for ever.
        let late = || transport.too_slow("no whole answer");
        let body =
            tokio::time::timeout(transport.request_timeout(), Limited::new(body, CREDENTIALS).collect());
        let body = body.await.map_err(|_| refuse(late()))?;
        let broken = |err| Failure::again(ErrorKind::Unavailable, format!("the answer broke off: {err}"));
        let body = body.map_err(|err| refuse(broken(err)))?.to_bytes();
        held.finish();
        return Ok(Got::Whole(Response::from_parts(parts, body.into())));
    }
    let reason =
        tokio::time::timeout(transport.request_timeout(), Limited::new(body, REASON).collect()).await;
    let reason = match reason {
        Ok(Ok(reason)) => {
            held.finish();
            reason.to_bytes()
        }
        // The status says enough.
        _ => Bytes::new(),
    };
    Err(judge(parts.status, &parts.headers, &reason))
}

/// A response's body. Tells when all of it was read.
struct Received {
    body: Incoming,
    end: Option<oneshot::Sender<()>>,
}

impl Body for Received {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let this = self.get_mut();
        let frame = std::task::ready!(Pin::new(&mut this.body).poll_frame(context));
        if (frame.is_none() || this.body.is_end_stream())
            && let Some(end) = this.end.take()
        {
            // The connection may be gone.
            let _ = end.send(());
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|err| broken_off(&err))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn broken_off(err: &hyper::Error) -> HttpError {
    let failure = crate::http::transport::hyper_failure(err, "the response broke off");
    let refusal = Refusal { failure, about_credentials: false, answered: true, empty: false };
    HttpError::new(HttpErrorKind::Interrupted, refusal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::client::HttpRequestBody;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::task::LocalSet;
    use tokio::time::Instant;

    /// Asks a server that sends `bytes` and then nothing more for something that isn't the object.
    fn ask(bytes: &'static str) -> Result<Bytes, HttpError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        LocalSet::new().block_on(&runtime.unwrap(), async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let uri = format!("http://{}/token", listener.local_addr().unwrap());
            tokio::task::spawn_local(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert!(stream.read(&mut [0; 4096]).await.unwrap() > 0);
                stream.write_all(bytes.as_bytes()).await.unwrap();
                std::future::pending::<()>().await;
            });
            let http = HttpOptions { request_timeout: Duration::from_millis(200), ..HttpOptions::default() };
            let connector = Connector::new(http);
            let client = connector.connect(&connector.options()).unwrap();
            let request = Request::get(uri).body(HttpRequestBody::empty()).unwrap();
            let start = Instant::now();
            let answer = async { client.execute(request).await?.into_body().bytes().await };
            let answer = tokio::time::timeout(Duration::from_secs(20), answer).await.unwrap();
            assert!(start.elapsed() < Duration::from_secs(10));
            answer
        })
    }

    #[test]
    fn what_gives_credentials_may_stall_and_nobody_waits_for_ever() {
        assert_eq!(&ask("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ntoken").unwrap()[..], b"token");
        let stalled = ask("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nto").unwrap_err();
        let refusal = Refusal::of(&stalled).unwrap();
        assert!(refusal.about_credentials && matches!(refusal.failure, Failure::Again(..)), "{refusal}");
    }
}
