//! What a front end has said about its guest: memory, features and queues.
//!
//! The `vhost` crate takes its messages apart and calls what is here, which must not wait. What has to be waited for comes before: see
//! [`Device::prepare`].

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::ioctl_fionbio;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

use super::chain::{Broken, MAX_DESCRIPTORS};
use super::config::chosen_wce;
use super::guest::{MAX_REGIONS, Memory, Table};
use super::handler::Handler;
use super::inflight::Inflight;
use super::queue::{Bell, QueueTask, RunningQueue};
use crate::kick::Kick;

/// Longest configuration space that a front end may ask for, in bytes.
const MAX_CONFIG: u32 = 256;

/// See the module.
pub(crate) struct Device {
    handler: Rc<Handler>,
    state: RefCell<State>,
    memory: Rc<RefCell<Memory>>,
    held: Rc<Cell<u64>>,
}

struct State {
    table: Table,
    /// What the guest's driver chose.
    features: u64,
    /// The cache mode that it chose: true if it flushes.
    wce: bool,
    queues: Vec<Vring>,
    inflight: Option<Inflight>,
}

/// A queue, running or not.
struct Vring {
    size: u16,
    addresses: Option<Addresses>,
    next_avail: u16,
    kick: Option<Rc<Kick>>,
    call: Bell,
    error: Bell,
    enabled: bool,
    /// The guest wrote nonsense; it rests until it is set up anew.
    broken: bool,
    running: Option<RunningQueue>,
}

/// Where a queue's parts are, as the front end sees its memory.
#[derive(Clone, Copy)]
struct Addresses {
    descriptors: u64,
    available: u64,
    used: u64,
}

impl Vring {
    fn new() -> Self {
        Self {
            size: 0,
            addresses: None,
            next_avail: 0,
            kick: None,
            call: Bell::default(),
            error: Bell::default(),
            enabled: false,
            broken: false,
            running: None,
        }
    }
}

impl Device {
    pub(crate) fn new(handler: Rc<Handler>) -> Self {
        let queues = (0..handler.options.queues).map(|_| Vring::new()).collect();
        let state = State { table: Table::default(), features: 0, wce: true, queues, inflight: None };
        handler.write_through.set(true);
        Self { handler, state: RefCell::new(state), memory: Rc::default(), held: Rc::default() }
    }

    /// Brings the queues to rest that a message of this kind, about queue `index` with value `value`, is about to change.
    pub(crate) async fn prepare(&self, code: u32, index: u32, value: u32) {
        const ONE: [FrontendReq; 5] = [
            FrontendReq::GET_VRING_BASE,
            FrontendReq::SET_VRING_NUM,
            FrontendReq::SET_VRING_ADDR,
            FrontendReq::SET_VRING_BASE,
            FrontendReq::SET_VRING_KICK,
        ];
        const ALL: [FrontendReq; 5] = [
            FrontendReq::SET_FEATURES,
            FrontendReq::RESET_OWNER,
            FrontendReq::RESET_DEVICE,
            FrontendReq::GET_INFLIGHT_FD,
            FrontendReq::SET_INFLIGHT_FD,
        ];
        let is = |request: &FrontendReq| u32::from(*request) == code;
        let disables = is(&FrontendReq::SET_VRING_ENABLE) && value == 0;
        if is(&FrontendReq::SET_VRING_KICK) {
            self.stop_queue((index & 0xff) as usize).await;
        } else if ONE.iter().any(is) || disables {
            self.stop_queue(index as usize).await;
        } else if ALL.iter().any(is) {
            self.stop_all().await;
        }
    }

    /// Brings a queue to rest: what was taken from it is answered.
    async fn stop_queue(&self, index: usize) {
        let running = self.state.borrow_mut().queues.get_mut(index).and_then(|queue| queue.running.take());
        let Some(running) = running else { return };
        let ended = running.stop().await;
        let queue = &mut self.state.borrow_mut().queues[index];
        match ended {
            Some(ended) => {
                queue.next_avail = ended.next_avail;
                queue.broken = ended.broken;
            }
            None => queue.broken = true,
        }
    }

    /// Brings all queues to rest.
    pub(crate) async fn stop_all(&self) {
        let count = self.state.borrow().queues.len();
        for index in 0..count {
            self.stop_queue(index).await;
        }
    }

    /// Starts the queues for which everything has been said.
    pub(crate) fn start_ready(&self) {
        let state = &mut *self.state.borrow_mut();
        let negotiated = state.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        for (index, queue) in state.queues.iter_mut().enumerate() {
            // Front ends that can't enable queues don't need to.
            let wanted = (queue.enabled || !negotiated) && !queue.broken && queue.running.is_none();
            let (true, Some(kick), Some(addresses)) = (wanted, queue.kick.clone(), queue.addresses) else {
                continue;
            };
            let record = state
                .inflight
                .as_ref()
                .and_then(|inflight| inflight.of_queue(u16::try_from(index).ok()?, queue.size));
            let mut task = QueueTask {
                index,
                queue: Queue::new(MAX_DESCRIPTORS as u16).expect("a power of two"),
                kick,
                call: queue.call.clone(),
                error: queue.error.clone(),
                record,
                again: VecDeque::new(),
                memory: self.memory.clone(),
                handler: self.handler.clone(),
                held: self.held.clone(),
            };
            let event_idx = state.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            match set_up(&mut task, &state.table, queue.size, addresses, queue.next_avail, event_idx) {
                Ok(()) => {
                    queue.running = Some(task.spawn());
                    // Answers of an earlier life may have been published without a word.
                    queue.call.ring();
                }
                Err(why) => {
                    tracing::warn!(
                        "vhost-user-blk: queue {index} of {} can't be run: {why}",
                        self.handler.id
                    );
                    queue.error.ring();
                    queue.broken = true;
                }
            }
        }
    }

    fn with_queue<T>(&self, index: u32, change: impl FnOnce(&mut Vring) -> Result<T>) -> Result<T> {
        let mut state = self.state.borrow_mut();
        let queue = state.queues.get_mut(index as usize);
        change(queue.ok_or(Error::InvalidOperation("there is no such queue"))?)
    }

    fn choose_write_through(&self, state: &State) {
        let through = self.handler.options.writes_through(state.features, state.wce);
        self.handler.write_through.set(through);
    }

    fn use_table(&self, state: &State) {
        self.memory.replace(state.table.memory());
    }
}

/// Sets a queue up in the guest's memory, with what is left of an earlier life.
fn set_up(
    task: &mut QueueTask,
    table: &Table,
    size: u16,
    addresses: Addresses,
    next_avail: u16,
    event_idx: bool,
) -> std::result::Result<(), Broken> {
    let memory = table.memory();
    let queue = &mut task.queue;
    let no_place = |err: Error| Broken::new(err.to_string());
    let misplaced = |err: virtio_queue::Error| Broken::new(err.to_string());
    queue.try_set_size(size).map_err(misplaced)?;
    let at = table.translate(addresses.descriptors).map_err(no_place)?;
    queue.try_set_desc_table_address(at).map_err(misplaced)?;
    let at = table.translate(addresses.available).map_err(no_place)?;
    queue.try_set_avail_ring_address(at).map_err(misplaced)?;
    let at = table.translate(addresses.used).map_err(no_place)?;
    queue.try_set_used_ring_address(at).map_err(misplaced)?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    if !queue.is_valid(&*memory) {
        return Err(Broken::new("its rings are not in the guest's memory"));
    }
    let used = queue.used_idx(&*memory, std::sync::atomic::Ordering::Acquire).map_err(misplaced)?.0;
    queue.set_next_used(used);
    queue.set_next_avail(next_avail);
    if let Some(record) = &mut task.record
        && let Some(again) = record.recover(used)?
    {
        // What was taken is what was answered and what wasn't. The front end may not know, if our predecessor didn't live to tell it.
        queue.set_next_avail(used.wrapping_add(again.len() as u16));
        task.again = again.into();
    }
    Ok(())
}

/// A descriptor that was handed over, such that it doesn't block.
fn unblocked(file: File) -> Result<OwnedFd> {
    let fd = OwnedFd::from(file);
    ioctl_fionbio(&fd, true).map_err(|err| Error::ReqHandlerError(err.into()))?;
    Ok(fd)
}

const NOT_OFFERED: Error = Error::InvalidOperation("it isn't offered");

impl VhostUserBackendReqHandler for Device {
    fn set_owner(&self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&self) -> Result<()> {
        let mut state = self.state.borrow_mut();
        state.queues.iter_mut().for_each(|queue| *queue = Vring::new());
        state.features = 0;
        self.choose_write_through(&state);
        Ok(())
    }

    fn get_features(&self) -> Result<u64> {
        Ok(self.handler.options.features(&self.handler.edge.disk()))
    }

    fn set_features(&self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        let mut state = self.state.borrow_mut();
        state.features = features;
        self.choose_write_through(&state);
        Ok(())
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let table = Table::new(regions, files)?;
        let mut state = self.state.borrow_mut();
        state.table = table;
        self.use_table(&state);
        Ok(None)
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        self.with_queue(index, |queue| {
            if !num.is_power_of_two() || num > MAX_DESCRIPTORS {
                return Err(Error::InvalidOperation("the size of a queue is a power of two up to 1024"));
            }
            queue.size = num as u16;
            Ok(())
        })
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        for address in [descriptors, used, available] {
            self.state.borrow().table.translate(address)?;
        }
        self.with_queue(index, |queue| {
            queue.addresses = Some(Addresses { descriptors, available, used });
            queue.broken = false;
            Ok(())
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.with_queue(index, |queue| {
            queue.next_avail = base;
            queue.broken = false;
            Ok(())
        })
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        self.with_queue(index, |queue| {
            // It starts again with the next kick that is handed over.
            queue.kick = None;
            queue.broken = false;
            Ok(VhostUserVringState::new(index, queue.next_avail.into()))
        })
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        // Without one, we would have to look all the time.
        let fd = fd.ok_or(Error::InvalidOperation("queues are not polled"))?;
        let kick = Kick::new(unblocked(fd)?).map_err(Error::ReqHandlerError)?;
        self.with_queue(index.into(), |queue| {
            queue.kick = Some(Rc::new(kick));
            Ok(())
        })
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.map(unblocked).transpose()?;
        self.with_queue(index.into(), |queue| {
            queue.call.replace(fd);
            // Whoever waits may have been told through the one that was there before.
            if queue.running.is_some() {
                queue.call.ring();
            }
            Ok(())
        })
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.map(unblocked).transpose()?;
        self.with_queue(index.into(), |queue| {
            queue.error.replace(fd);
            Ok(())
        })
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(super::config::BlkOptions::protocol_features())
    }

    fn set_protocol_features(&self, _features: u64) -> Result<()> {
        // The `vhost` crate refuses what needs a feature that wasn't chosen.
        Ok(())
    }

    fn get_queue_num(&self) -> Result<u64> {
        Ok(self.handler.options.queues.into())
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.with_queue(index, |queue| {
            queue.enabled = enable;
            Ok(())
        })
    }

    fn get_config(&self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let end = offset.checked_add(size).filter(|end| *end <= MAX_CONFIG).ok_or(Error::InvalidParam)?;
        let wce = self.state.borrow().wce && !self.handler.options.writethrough;
        let mut space = self.handler.options.space(&self.handler.edge.disk(), wce).to_vec();
        space.resize(MAX_CONFIG as usize, 0);
        Ok(space[offset as usize..end as usize].to_vec())
    }

    fn set_config(&self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let wce = chosen_wce(offset, bytes);
        let wce = wce.ok_or(Error::InvalidOperation("only the cache mode can be written"))?;
        let mut state = self.state.borrow_mut();
        state.wce = wce;
        if let Some(inflight) = &state.inflight {
            inflight.remember_wce(wce);
        }
        self.choose_write_through(&state);
        Ok(())
    }

    fn set_gpu_socket(&self, _gpu: GpuBackend) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(NOT_OFFERED)
    }

    fn get_inflight_fd(&self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (wanted.num_queues, wanted.queue_size);
        if queues > self.handler.options.queues {
            return Err(Error::InvalidOperation("there are not so many queues"));
        }
        Inflight::create(queues, size, self.state.borrow().wce)
    }

    fn set_inflight_fd(&self, told: &VhostUserInflight, file: File) -> Result<()> {
        let inflight = Inflight::adopt(told, file)?;
        let mut state = self.state.borrow_mut();
        if let Some(wce) = inflight.remembered_wce() {
            state.wce = wce;
        }
        state.inflight = Some(inflight);
        self.choose_write_through(&state);
        Ok(())
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let mut state = self.state.borrow_mut();
        state.table.add(region, file)?;
        self.use_table(&state);
        Ok(None)
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let mut state = self.state.borrow_mut();
        state.table.remove(region)?;
        self.use_table(&state);
        Ok(())
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(NOT_OFFERED)
    }

    fn check_device_state(&self) -> Result<()> {
        Err(NOT_OFFERED)
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        Err(NOT_OFFERED)
    }

    fn set_log_base(&self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(NOT_OFFERED)
    }
}
