//! The simplest job: some work that is done as a whole, or fails. It knows no pause, and once it has begun no cancel.

use crate::control::{Control, Outcome};
use crate::copy_engine::Stopped;
use crate::handle::JobHandle;
use crate::lifecycle;
use crate::on_error::OnError;
use headwater_block::Result;

/// Makes a job of `work`. It is created with the call, and works while the future is polled, which must be to its end.
pub fn task(
    work: impl Future<Output = Result<()>>,
    wait_for_dismiss: bool,
) -> (JobHandle, impl Future<Output = Outcome>) {
    let control = Control::new(0, OnError::Report);
    let handle = JobHandle::new(control.clone());
    let run = async move {
        let all = async {
            work.await.map_err(Stopped::Failed)?;
            lifecycle::wait_for_finalize(&control, false).await?;
            lifecycle::commit(&control, std::future::ready(Ok(()))).await
        };
        lifecycle::run(&control, wait_for_dismiss, all).await
    };
    (handle, run)
}
