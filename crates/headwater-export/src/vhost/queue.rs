//! The task of one running queue: from kicks to requests to answers.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_block::{Abort, Client};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::task::coop::consume_budget;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::chain::{Broken, Descriptors, Request};
use super::guest::Memory;
use super::handler::{Handler, PIECE};
use super::inflight::Record;
use crate::kick::Kick;

/// Most memory that one client's requests hold, in bytes. A queue where nothing runs takes one more all the same, so that each gets on.
const MAX_BYTES_IN_FLIGHT: u64 = 32 << 20;

/// An eventfd that we signal; the front end may exchange it at any time.
#[derive(Clone, Default)]
pub(crate) struct Bell(Rc<RefCell<Option<OwnedFd>>>);

impl Bell {
    pub(crate) fn replace(&self, fd: Option<OwnedFd>) {
        self.0.replace(fd);
    }

    /// Signals, if there is somebody to hear it.
    pub(crate) fn ring(&self) {
        if let Some(fd) = &*self.0.borrow() {
            // One that is full has been signalled; one that is broken is the front end's loss.
            let _ = rustix::io::write(fd, &1u64.to_le_bytes());
        }
    }
}

/// What a queue is started with.
pub(crate) struct QueueTask {
    /// Which one it is, for messages.
    pub(crate) index: usize,
    pub(crate) queue: Queue,
    pub(crate) kick: Rc<Kick>,
    pub(crate) call: Bell,
    pub(crate) error: Bell,
    pub(crate) record: Option<Record>,
    /// Requests of an earlier life that were never answered, in their order.
    pub(crate) again: VecDeque<u16>,
    /// The guest's memory of the moment.
    pub(crate) memory: Rc<RefCell<Memory>>,
    pub(crate) handler: Rc<Handler>,
    /// What all queues of the client hold of [`MAX_BYTES_IN_FLIGHT`].
    pub(crate) held: Rc<Cell<u64>>,
}

/// A queue that runs.
pub(crate) struct RunningQueue {
    stop: oneshot::Sender<()>,
    leaves: Rc<Abort>,
    task: JoinHandle<Ended>,
}

/// What became of a queue.
pub(crate) struct Ended {
    /// Where in the available ring it is to be gone on.
    pub(crate) next_avail: u16,
    /// It can't be gone on with, because the guest wrote nonsense.
    pub(crate) broken: bool,
}

impl RunningQueue {
    /// Takes no more requests, and waits until those that were taken are answered: those that are held, with an error. `None` if the task
    /// failed.
    pub(crate) async fn stop(self) -> Option<Ended> {
        self.leaves.abort();
        // A task that is over doesn't hear it.
        let _ = self.stop.send(());
        match self.task.await {
            Ok(ended) => Some(ended),
            Err(error) => {
                tracing::error!("a vhost-user queue failed: {error}");
                None
            }
        }
    }
}

/// A request that was carried out.
struct Done {
    head: u16,
    status: u8,
    at: GuestAddress,
    room: u32,
    cost: u64,
    memory: Memory,
}

type Running = FuturesUnordered<Pin<Box<dyn Future<Output = Done>>>>;

impl QueueTask {
    /// Runs until it is stopped or the guest breaks it.
    pub(crate) fn spawn(self) -> RunningQueue {
        let (stop, stopped) = oneshot::channel();
        let leaves = Abort::new();
        let client = Rc::new(Client::new(self.handler.edge.clone(), leaves.clone()));
        RunningQueue { stop, leaves, task: tokio::task::spawn_local(self.run(client, stopped)) }
    }

    async fn run(mut self, client: Rc<Client>, mut stopped: oneshot::Receiver<()>) -> Ended {
        let mut running = Running::new();
        // Heads that are being worked on: a driver that offers one of them again is broken.
        let mut taken = vec![false; self.queue.size().into()];
        let (mut stopping, mut broken) = (false, false);
        loop {
            // What never waits is counted by nobody: kicks without end, or requests that need no disk from a guest that doesn't
            // pause, must not keep the thread from everybody else.
            consume_budget().await;
            let mut full = true;
            if !broken {
                // What was taken in an earlier life is finished also on the way to rest.
                let filled = match self.fill_again(&client, &mut running, &mut taken) {
                    Ok(false) if !stopping => self.fill(&client, &mut running, &mut taken),
                    filled => filled,
                };
                match filled {
                    Ok(is_full) => full = is_full || stopping,
                    Err(why) => broken = self.tell(&why),
                }
            }
            if (stopping || broken) && running.is_empty() {
                return Ended { next_avail: self.queue.next_avail(), broken };
            }
            tokio::select! {
                biased;
                // A sender that is gone has lost interest as well.
                _ = &mut stopped, if !stopping => stopping = true,
                Some(done) = running.next(), if !running.is_empty() => {
                    let mut next = Some(done);
                    while let Some(done) = next {
                        taken[usize::from(done.head)] = false;
                        if let Err(why) = self.answer(&done) {
                            broken = self.tell(&why);
                        }
                        next = running.next().now_or_never().flatten();
                    }
                    match self.wants_notification() {
                        Ok(true) => self.call.ring(),
                        Ok(false) => {}
                        Err(why) => broken = self.tell(&why),
                    }
                }
                kicked = self.kick.wait(), if !full => {
                    if let Err(error) = kicked {
                        broken = self.tell(&Broken::new(format!("nobody can kick it any more: {error}")));
                    }
                }
            }
        }
    }

    /// Says that the queue is broken, which is always true.
    fn tell(&self, why: &Broken) -> bool {
        let index = self.index;
        tracing::warn!("vhost-user-blk: queue {index} of {} is stopped: {why}", self.handler.id);
        self.error.ring();
        true
    }

    /// Starts the requests of an earlier life; true if there are more than there is room for.
    fn fill_again(
        &mut self,
        client: &Rc<Client>,
        running: &mut Running,
        taken: &mut [bool],
    ) -> Result<bool, Broken> {
        let memory = self.memory.borrow().clone();
        while let Some(&head) = self.again.front() {
            if !self.has_room(running) {
                return Ok(true);
            }
            self.again.pop_front();
            running.push(self.start(client, head, &memory, taken)?);
        }
        Ok(false)
    }

    /// Starts the requests that are offered; true if there may be more than there is room for.
    fn fill(
        &mut self,
        client: &Rc<Client>,
        running: &mut Running,
        taken: &mut [bool],
    ) -> Result<bool, Broken> {
        let memory = self.memory.borrow().clone();
        loop {
            self.queue.disable_notification(&*memory).map_err(lost)?;
            loop {
                if !self.has_room(running) {
                    return Ok(true);
                }
                let Some(head) = self.next_head(&memory)? else { break };
                if let Some(record) = &mut self.record
                    && head < self.queue.size()
                {
                    record.take(head);
                }
                running.push(self.start(client, head, &memory, taken)?);
            }
            if !self.queue.enable_notification(&*memory).map_err(lost)? {
                return Ok(false);
            }
        }
    }

    fn has_room(&self, running: &Running) -> bool {
        running.is_empty()
            || running.len() < usize::from(self.queue.size()) && self.held.get() < MAX_BYTES_IN_FLIGHT
    }

    fn next_head(&mut self, memory: &GuestMemoryMmap) -> Result<Option<u16>, Broken> {
        let there = self.queue.avail_idx(memory, Ordering::Acquire).map_err(lost)?;
        if there.0 == self.queue.next_avail() {
            return Ok(None);
        }
        let chain = self.queue.iter(memory).map_err(lost)?.next();
        let chain = chain.ok_or_else(|| Broken::new("its available ring is outside the guest's memory"))?;
        Ok(Some(chain.head_index()))
    }

    /// The work for the request at `head`.
    fn start(
        &self,
        client: &Rc<Client>,
        head: u16,
        memory: &Memory,
        taken: &mut [bool],
    ) -> Result<Pin<Box<dyn Future<Output = Done>>>, Broken> {
        match taken.get_mut(usize::from(head)) {
            Some(taken) if !*taken => *taken = true,
            Some(_) => return Err(Broken::new(format!("descriptor {head} is offered again unanswered"))),
            None => return Err(Broken::new(format!("descriptor {head} is past the end of the queue"))),
        }
        let start = GuestAddress(self.queue.desc_table());
        let descriptors = Descriptors { start, count: self.queue.size().into() };
        let request = descriptors.request(memory, head)?;
        let cost = request.kind.data_len().min(PIECE);
        self.held.set(self.held.get() + cost);
        let (handler, client, memory) = (self.handler.clone(), client.clone(), memory.clone());
        Ok(Box::pin(async move {
            let status = handler.handle(&client, &request, &memory).await;
            let Request { status: at, room, .. } = request;
            Done { head, status, at, room, cost, memory }
        }))
    }

    /// Puts an answer into the used ring.
    fn answer(&mut self, done: &Done) -> Result<(), Broken> {
        self.held.set(self.held.get() - done.cost);
        let told = done.memory.write_obj(done.status, done.at);
        told.map_err(|_| Broken::new("the outcome of a request has lost its place"))?;
        if let Some(record) = &self.record {
            record.answering(done.head);
        }
        let memory = self.memory.borrow().clone();
        self.queue.add_used(&*memory, done.head, done.room).map_err(lost)?;
        if let Some(record) = &self.record {
            record.answered(done.head, self.queue.next_used());
        }
        Ok(())
    }

    /// Whether the driver wants to hear of the answers since it was last asked.
    fn wants_notification(&mut self) -> Result<bool, Broken> {
        let memory = self.memory.borrow().clone();
        let wants = self.queue.needs_notification(&*memory).map_err(lost)?;
        if self.queue.event_idx_enabled() {
            return Ok(wants);
        }
        let flags: u16 = memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|_| Broken::new("its available ring is outside the guest's memory"))?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

fn lost(error: virtio_queue::Error) -> Broken {
    Broken::new(error.to_string())
}
