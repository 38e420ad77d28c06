//! A monitor: QMP on a connection.
//!
//! Commands of one monitor are carried out one after the other, in the order in which they came. What is to be sent waits in the [`Outbox`], so
//! that a client that doesn't read holds up neither the daemon nor other clients: while much waits, no further command of that client is
//! taken, and a client for which too much waits is cut off.

use super::chardev::{Chardev, Connection};
use super::commands::Commands;
use super::failure::Refusal;
use headwater_qmp::{Event, Greeting, Reader, Request, Response, Style, SyntaxError, encode, schema};
use serde::Serialize;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// While so many bytes wait to be read by the client, none of its commands is taken.
const ENOUGH_WAITING: usize = 1 << 20;

/// A client that lets so many bytes wait is cut off.
const TOO_MUCH_WAITING: usize = 64 << 20;

/// What waits to be sent to a client.
#[derive(Default)]
pub(super) struct Outbox {
    pretty: bool,
    lines: RefCell<VecDeque<Vec<u8>>>,
    waiting: Cell<usize>,
    /// Nothing is sent any more: the client is gone, or too slow.
    closed: Cell<bool>,
    wakers: RefCell<Vec<Waker>>,
}

impl Outbox {
    fn push(&self, message: &impl Serialize) {
        if self.closed.get() {
            return;
        }
        let style = if self.pretty { Style::Pretty } else { Style::Compact };
        let line = encode(message, style);
        self.waiting.set(self.waiting.get() + line.len());
        self.lines.borrow_mut().push_back(line);
        if self.waiting.get() > TOO_MUCH_WAITING {
            tracing::warn!("a monitor's client doesn't read what it is sent: cut off");
            self.closed.set(true);
            self.lines.borrow_mut().clear();
        }
        self.wake();
    }

    /// Puts an event where the client will find it.
    pub(super) fn push_event(&self, event: &Event) {
        self.push(event);
    }

    fn wake(&self) {
        self.wakers.borrow_mut().drain(..).for_each(Waker::wake);
    }

    async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        poll_fn(|cx| {
            if condition(self) {
                return Poll::Ready(());
            }
            self.wakers.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// The next line to send; none when it is closed.
    async fn next(&self) -> Option<Vec<u8>> {
        self.wait_until(|outbox| outbox.closed.get() || !outbox.lines.borrow().is_empty()).await;
        if self.closed.get() && self.lines.borrow().is_empty() {
            return None;
        }
        self.lines.borrow_mut().pop_front()
    }

    fn sent(&self, bytes: usize) {
        self.waiting.set(self.waiting.get().saturating_sub(bytes));
        self.wake();
    }

    /// What waits is sent, and then the connection ends.
    pub(super) fn close(&self) {
        self.closed.set(true);
        self.wake();
    }
}

/// Serves QMP on the connections of a character device, one after the other, until the daemon ends.
pub(super) async fn serve(chardev: Rc<Chardev>, commands: Rc<Commands>, pretty: bool) {
    loop {
        let connection = tokio::select! {
            biased;
            () = commands.ending() => return,
            connection = chardev.connection() => connection,
        };
        match connection {
            Some(connection) => converse(connection, &commands, pretty).await,
            None => return,
        }
    }
}

/// One client, from greeting to end.
async fn converse(connection: Connection, commands: &Rc<Commands>, pretty: bool) {
    let Connection { mut input, mut output } = connection;
    let outbox = Rc::new(Outbox { pretty, ..Outbox::default() });
    outbox.push(&Greeting { version: &commands.version() });
    let writer = {
        let outbox = outbox.clone();
        async move {
            while let Some(line) = outbox.next().await {
                if output.write_all(&line).await.is_err() || output.flush().await.is_err() {
                    outbox.close();
                    outbox.lines.borrow_mut().clear();
                    break;
                }
                outbox.sent(line.len());
            }
            // A client that waits for the end of our answers gets it.
            let _ = output.shutdown().await;
        }
    };
    let reader = async {
        let mut session = Session { commands: commands.clone(), outbox: outbox.clone(), negotiated: false };
        let mut messages = Reader::new();
        let mut bytes = vec![0; 64 << 10];
        loop {
            let read = tokio::select! {
                biased;
                () = outbox.wait_until(|outbox| outbox.closed.get()) => break,
                read = input.read(&mut bytes) => read,
            };
            match read {
                Ok(0) | Err(_) => break,
                Ok(read) => messages.push(&bytes[..read]),
            }
            while let Some(message) = messages.next() {
                session.answer(message).await;
                if commands.is_quitting() {
                    return;
                }
                outbox
                    .wait_until(|outbox| outbox.closed.get() || outbox.waiting.get() < ENOUGH_WAITING)
                    .await;
            }
        }
    };
    let reader = async {
        reader.await;
        // After `quit` events may follow, until the daemon has ended everything.
        if commands.is_quitting() {
            commands.ended().await;
        }
        outbox.close();
    };
    futures_util::future::join(writer, reader).await;
}

struct Session {
    commands: Rc<Commands>,
    outbox: Rc<Outbox>,
    negotiated: bool,
}

impl Session {
    /// Carries out one message and answers it.
    async fn answer(&mut self, message: Result<Value, SyntaxError>) {
        let response = match message {
            Err(malformed) => Response::failure(malformed, None),
            Ok(value) => match Request::parse(value) {
                Err(bad) => Response::failure(bad.error, bad.id),
                Ok(request) => {
                    let id = request.id.clone();
                    match self.carry_out(request).await {
                        Ok(value) => Response::success(value, id),
                        Err(refusal) => Response::failure(refusal, id),
                    }
                }
            },
        };
        self.outbox.push(&response);
    }

    async fn carry_out(&mut self, request: Request) -> Result<Value, Refusal> {
        let name = request.execute.as_str();
        if name == "qmp_capabilities" {
            if self.negotiated {
                return Err(Refusal::negotiation_complete());
            }
            let arguments = schema::check_command(name, request.arguments)?;
            if arguments.get("enable").and_then(Value::as_array).is_some_and(|wanted| !wanted.is_empty()) {
                return Err(Refusal::capability_unavailable("oob"));
            }
            self.negotiated = true;
            self.commands.events().listen(&self.outbox);
            return Ok(json!({}));
        }
        if !self.negotiated {
            return Err(Refusal::negotiation_expected());
        }
        tracing::trace!(target: super::trace::TARGET, event = "handle_qmp_command", name);
        let arguments = schema::check_command(name, request.arguments)?;
        self.commands.execute(name, arguments).await
    }
}
