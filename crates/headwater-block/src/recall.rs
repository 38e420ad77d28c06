//! Recalling requests: a job that is cancelled need not wait until storage that is out of reach comes back, for requests that nobody wants any more.
//!
//! Reads are simply dropped ([`crate::Abort`]). A change isn't: the bytes that it may be changing stay locked until it is over. But one that
//! waits for a connection has nothing under way, and can end at once with `Cancelled`. What its range holds then isn't known, as after any other error.
//!
//! A job carries out its requests under a switch, with [`Disk::recallable`](crate::Disk::recallable); storage waits with [`wait`], which gives up when that switch is thrown. So
//! only the requests of that job end, and those of guests that wait for its copy; everybody else's to the same storage go on waiting. The switch belongs to the future that is
//! polled, not to the request's arguments: a node in between need not know of it.
//!
//! A flush under a switch covers everything, one without it what was written without one, and perhaps more: a job flushes what it has written before it ends well, and what it leaves behind otherwise is no
//! use. So nobody waits for that when the storage is closed.
//!
//! That is right only where a request of a node is requests of the node below, of that future alone. An image's metadata are written for several who wait for them, and an
//! error there costs more than one request; so images don't take part ([`Node::can_recall`](crate::Node::can_recall)).

use crate::abort::Abort;
use crate::error::{Error, ErrorKind, Result};
use futures_util::future::{Either, select};
use std::pin::pin;
use std::rc::Rc;

tokio::task_local! {
    /// What recalls the request that is being polled, if anything does.
    static SWITCH: Option<Rc<Abort>>;
}

/// Carries out `work` such that what waits in it ([`wait`]) gives up when `switch` is thrown.
pub(crate) async fn under<T>(switch: Rc<Abort>, work: impl Future<Output = T>) -> T {
    SWITCH.scope(Some(switch), work).await
}

/// Carries out `work` such that nobody recalls it, although it is part of a request that somebody may: what it does is for others.
pub(crate) async fn shielded<T>(work: impl Future<Output = T>) -> T {
    SWITCH.scope(None, work).await
}

fn switch() -> Option<Rc<Abort>> {
    SWITCH.try_with(Option::clone).ok().flatten()
}

/// True if the request that is being polled can be recalled.
pub fn is_recallable() -> bool {
    switch().is_some()
}

/// Waits for something that may take long and may be dropped, unless the request that waits is recalled. What is there already is taken all the same.
///
/// # Errors
/// `Cancelled` if the request was recalled.
pub async fn wait<T>(wait: impl Future<Output = T>) -> Result<T> {
    let Some(switch) = switch() else { return Ok(wait.await) };
    match select(pin!(wait), pin!(switch.wait())).await {
        Either::Left((done, _)) => Ok(done),
        Either::Right(_) => Err(Error::new(
            ErrorKind::Cancelled,
            "the request was recalled while it waited for storage that is out of reach",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use futures_util::future::{join, pending, ready};

    #[test]
    fn only_what_runs_under_the_switch_is_recalled() {
        let switch = Abort::new();
        let mut others = Box::pin(wait(pending::<()>()));
        let mut of_job = Box::pin(under(switch.clone(), join(wait(pending::<()>()), wait(ready(7)))));
        assert!(others.as_mut().now_or_never().is_none());
        assert!(of_job.as_mut().now_or_never().is_none());
        switch.abort();
        let (waited, there) = of_job.now_or_never().expect("it was recalled");
        assert_eq!(waited.unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(there.unwrap(), 7);
        assert!(others.now_or_never().is_none(), "nobody has recalled it");
        assert!(!is_recallable());
        // Later ones don't begin to wait.
        assert!(under(switch.clone(), wait(pending::<()>())).now_or_never().expect("at once").is_err());
        assert!(under(switch.clone(), async { is_recallable() }).now_or_never().expect("at once"));
        let for_others = under(switch, shielded(wait(pending::<()>())));
        assert!(for_others.now_or_never().is_none(), "what is done for others goes on");
    }
}
