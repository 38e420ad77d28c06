//! Takes a device's requests and answers them, as they come, until the device goes.

use super::handler::Handler;
use crate::kick::Kick;
use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use headwater_ublk::Queue;
use std::io;
use std::rc::Rc;
use tokio::task::coop::consume_budget;

/// Returns when the device has gone, or its queue can't be used any more. What it has taken is carried out to its end first.
pub(crate) async fn serve(mut queue: Queue, kick: Kick, handler: Rc<Handler>) -> io::Result<()> {
    let mut running = FuturesUnordered::new();
    let mut arrived = Vec::new();
    let mut lost = None;
    loop {
        // Requests that need no waiting must not keep the thread from everybody else.
        consume_budget().await;
        if lost.is_none() {
            lost = queue.poll(&mut arrived).err();
        }
        running.extend(arrived.drain(..).map(|arrived| handler.clone().handle(arrived)));
        let over = lost.is_some() || queue.is_over();
        if over && running.is_empty() {
            return lost.map_or(Ok(()), Err);
        }
        tokio::select! {
            biased;
            Some(done) = running.next(), if !running.is_empty() => {
                let mut next = Some(done);
                while let Some((tag, answer)) = next {
                    if !over {
                        queue.answer(tag, answer);
                    }
                    next = running.next().now_or_never().flatten();
                }
            }
            kicked = kick.wait(), if !over => lost = kicked.err(),
        }
    }
}
