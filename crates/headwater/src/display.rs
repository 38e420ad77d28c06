//! Where progress is shown: a bar on a terminal, JSON for a program, or nothing.
//!
//! A terminal that was stopped (Ctrl-S) or a pipe that nobody empties blocks whoever writes to it. The disk's thread must not wait for
//! that, so all output goes through a thread of its own; progress that it has no time for is left out, everything else is kept.

use crate::progress::{Status, line};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// How much may wait to be shown before progress is left out.
const MOST_WAITING: usize = 4;

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// A bar on standard error.
    Bar,
    /// One JSON object a line, to standard output.
    Json,
    /// Not at all: neither a terminal nor a program reads.
    Quiet,
}

/// See the module. Dropping it waits until all has been shown.
pub struct Display {
    style: Style,
    sender: Option<Sender<Message>>,
    waiting: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

enum Message {
    Status(Status),
    Last(Status),
    Text(String),
}

impl Display {
    /// JSON if asked for, a bar if standard error is a terminal.
    pub fn choose(json: bool) -> Self {
        let style = match (json, std::io::stderr().is_terminal()) {
            (true, _) => Style::Json,
            (false, true) => Style::Bar,
            (false, false) => Style::Quiet,
        };
        Self::new(style)
    }

    /// No progress, only what is said: somebody else has the terminal.
    pub fn quiet() -> Self {
        Self::new(Style::Quiet)
    }

    fn new(style: Style) -> Self {
        let (sender, receiver) = mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let shown = waiting.clone();
        let thread = std::thread::spawn(move || Screen::new(style).run(&receiver, &shown));
        Self { style, sender: Some(sender), waiting, thread: Some(thread) }
    }

    /// How often to show anything new.
    pub fn interval(&self) -> Duration {
        match self.style {
            Style::Bar => Duration::from_millis(100),
            Style::Json => Duration::from_millis(500),
            Style::Quiet => Duration::from_secs(1),
        }
    }

    /// Shows how far it is.
    pub fn show(&self, status: Status) {
        if self.waiting.load(Ordering::Relaxed) < MOST_WAITING {
            self.send(Message::Status(status));
        }
    }

    /// Shows how far it is at the end.
    pub fn finish(&self, status: Status) {
        self.send(Message::Last(status));
    }

    /// Says something that stays on the screen: on standard error, above the bar.
    pub fn say(&self, text: &str) {
        self.send(Message::Text(text.to_owned()));
    }

    fn send(&self, message: Message) {
        if let Some(sender) = &self.sender {
            self.waiting.fetch_add(1, Ordering::Relaxed);
            // If the thread is gone, nothing can be shown any more, which is no reason to end a stream.
            let _ = sender.send(message);
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.sender.take();
        if let Some(thread) = self.thread.take() {
            // It ends when it has shown everything; if it failed, there is nowhere to say so.
            let _ = thread.join();
        }
    }
}

/// What the thread writes to.
struct Screen {
    style: Style,
    /// Made with the first status: before that it would show nothing as done.
    bar: Option<ProgressBar>,
}

impl Screen {
    fn new(style: Style) -> Self {
        Self { style, bar: None }
    }

    fn run(mut self, messages: &Receiver<Message>, shown: &AtomicUsize) {
        for message in messages {
            match message {
                Message::Status(status) => self.show(&status),
                Message::Last(status) => {
                    self.show(&status);
                    if let Some(bar) = &self.bar {
                        bar.abandon();
                    }
                }
                Message::Text(text) => match &self.bar {
                    Some(bar) => bar.suspend(|| say(&text)),
                    None => say(&text),
                },
            }
            shown.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn show(&mut self, status: &Status) {
        match self.style {
            Style::Bar => draw(self.bar.get_or_insert_with(new_bar), status),
            Style::Json => {
                let Ok(text) = serde_json::to_string(status) else { return };
                // A reader of the progress that has gone must not end the stream.
                let _ = writeln!(std::io::stdout(), "{text}");
            }
            Style::Quiet => {}
        }
    }
}

fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

fn new_bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{bar:30} {percent:>3}%  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ "));
    bar
}

fn draw(bar: &ProgressBar, status: &Status) {
    let nothing_to_do = status.total == 0 && status.total_is_exact;
    let done = if nothing_to_do { 1 } else { status.copied };
    bar.set_message(line(status));
    bar.update(|state| {
        state.set_len(status.total.max(1));
        state.set_pos(done);
    });
}
