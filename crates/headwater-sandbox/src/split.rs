//! One process becomes two, and one of them gives up what it doesn't need.

use crate::broker::{Desk, Names};
use crate::grants::Grants;
use crate::memory::Memory;
use crate::packet::{receive_packet, send_packet};
use crate::{profile, sys};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitOptions};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

/// The sandbox can't be had: what the system lacks, or denies.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unavailable(String);

impl Unavailable {
    pub(crate) fn new(what: &str, err: impl std::fmt::Display) -> Self {
        Self(format!("{what}: {err}"))
    }
}

/// Which of the two this process is.
#[derive(Debug)]
pub enum Side {
    /// The original.
    DataPlane(DataPlane),
    /// The copy.
    Broker(Broker),
}

/// The original process, which is to be locked down.
#[derive(Debug)]
pub struct DataPlane {
    life: OwnedFd,
    /// Where the broker waits for the calls that stop; until there is a lock-down.
    hand_over: Option<OwnedFd>,
    broker: Pid,
}

/// The copy, which opens files for the original.
#[derive(Debug)]
pub struct Broker {
    life: OwnedFd,
    hand_over: OwnedFd,
    memory: File,
    caller: OwnedFd,
}

/// What one side says when it is ready.
const READY: &[u8] = b"ready";

/// Makes two processes of one. The copy dies when the thread that called this does, and ignores the signals with which people end a
/// program: it goes when the original has done its work and gone.
///
/// # Errors
/// Says what is missing: Landlock, seccomp's listeners (Linux 5.19), or the right of a process to look into its parent; or that this process
/// has threads already. Then there is one process still.
pub fn split() -> Result<Side, Unavailable> {
    if !has_landlock() {
        return Err(Unavailable("the kernel has no Landlock, or it is switched off".into()));
    }
    if !sys::has_listeners() {
        return Err(Unavailable("the kernel has no seccomp filters with listeners (Linux 5.19)".into()));
    }
    let parent = rustix::process::getpid();
    let cannot = |err: &dyn std::fmt::Display| Unavailable::new("cannot prepare a second process", err);
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (life, brokers_life) = pair().map_err(|err| cannot(&err))?;
    let (hand_over, brokers_hand_over) = pair().map_err(|err| cannot(&err))?;
    // Opened by the original, which may: what the copy may look into is a matter of policies.
    let memory = File::open("/proc/self/mem").map_err(|err| cannot(&err))?;
    let caller = rustix::process::pidfd_open(parent, PidfdFlags::empty()).map_err(|err| cannot(&err))?;
    if let Some(broker) = sys::fork().map_err(|err| cannot(&err))? {
        drop((brokers_life, brokers_hand_over, memory, caller));
        // Where Yama guards processes, a child may look into its parent only if that lets it. Without Yama this fails, and needn't be.
        let _ = rustix::process::set_ptracer(rustix::process::PTracer::ProcessID(broker));
        let plane = DataPlane { life, hand_over: Some(hand_over), broker };
        return plane.meet().map(Side::DataPlane);
    }
    // The copy.
    let number = life.as_raw_fd();
    drop((life, hand_over));
    let broker = Broker { life: brokers_life, hand_over: brokers_hand_over, memory, caller };
    match broker.begin(parent, number) {
        Ok(()) => Ok(Side::Broker(broker)),
        Err(why) => {
            // The original says what is to be said.
            let _ = send_packet(&broker.hand_over, why.to_string().as_bytes(), &[]);
            std::process::exit(1);
        }
    }
}

impl DataPlane {
    /// Waits until the broker has found out whether it can do its work.
    fn meet(self) -> Result<Self, Unavailable> {
        let hand_over = self.hand_over.as_ref().unwrap_or(&self.life);
        // It waits for this: only now may it look.
        let asked = send_packet(hand_over, READY, &[]).and_then(|()| receive_packet(hand_over, 1024));
        let why = match asked {
            Ok(Some((word, _))) if word == READY => return Ok(self),
            Ok(Some((word, _))) => String::from_utf8_lossy(&word).into_owned(),
            Ok(None) => "it ended".to_owned(),
            Err(err) => err.to_string(),
        };
        self.end();
        Err(Unavailable::new("the second process cannot do its work", why))
    }

    /// Gives up, for good, what isn't needed, in this thread and those that it will start: afterwards the broker must be
    /// [serving](Broker::serve). Rings must have been set up before.
    ///
    /// # Errors
    /// If it can't be had wholly. Then this process may have lost rights that it needs: it should end. Also if it has threads already.
    pub fn lock_down(&mut self) -> Result<(), Unavailable> {
        let threads = sys::threads().map_err(|err| Unavailable::new("cannot count threads", err))?;
        let Some(hand_over) = self.hand_over.take().filter(|_| threads == 1) else {
            return Err(Unavailable("this process has threads, or is locked down already".into()));
        };
        restrict()?;
        let cannot = |err: &dyn std::fmt::Display| Unavailable::new("cannot install a seccomp filter", err);
        let asking = profile::asking().map_err(|err| cannot(&err))?;
        let rest = profile::data_plane(std::process::id()).map_err(|err| cannot(&err))?;
        let listener = sys::install_with_listener(&asking).map_err(|err| cannot(&err))?;
        seccompiler::apply_filter(&rest).map_err(|err| cannot(&err))?;
        send_packet(&hand_over, READY, &[listener.as_fd()]).map_err(|err| cannot(&err))?;
        match receive_packet(&hand_over, READY.len()) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(Unavailable("the broker has ended".into())),
            Err(err) => Err(Unavailable::new("the broker doesn't answer", err)),
        }
    }

    /// A socket on which the broker says nothing, and that is readable when the broker is gone. What is sent there [reaches](Broker::life) it.
    pub fn life(&self) -> BorrowedFd<'_> {
        self.life.as_fd()
    }

    /// Lets the broker go, and waits until it has.
    pub fn end(self) {
        let broker = self.broker;
        drop(self);
        // It is our child, so that another error means that somebody waited already.
        while let Err(Errno::INTR) = rustix::process::waitpid(Some(broker), WaitOptions::empty()) {}
    }
}

impl Broker {
    /// What a broker does before it knows what it is for.
    fn begin(&self, parent: Pid, number: i32) -> Result<(), Unavailable> {
        let cannot = |err: &dyn std::fmt::Display| Unavailable::new("cannot begin", err);
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(|err| cannot(&err))?;
        if rustix::process::getppid() != Some(parent) {
            return Err(cannot(&"the original has ended"));
        }
        sys::ignore_endings();
        let program = profile::broker().map_err(|err| cannot(&err))?;
        seccompiler::apply_filter(&program).map_err(|err| cannot(&err))?;
        receive_packet(&self.hand_over, READY.len()).map_err(|err| cannot(&err))?;
        // What will be needed whenever a socket is connected.
        rustix::process::pidfd_getfd(&self.caller, number, PidfdGetfdFlags::empty()).map_err(|err| {
            Unavailable::new(
                "it may not look into its parent (Yama's ptrace_scope, a container's seccomp profile)",
                err,
            )
        })?;
        send_packet(&self.hand_over, READY, &[]).map_err(|err| cannot(&err))
    }

    /// A socket that ends with the original.
    pub fn life(&self) -> BorrowedFd<'_> {
        self.life.as_fd()
    }

    /// A copy of [`Broker::life`].
    ///
    /// # Errors
    /// If there is no room for one more descriptor.
    pub fn clone_life(&self) -> io::Result<OwnedFd> {
        self.life.try_clone()
    }

    /// Makes the calls of the data plane that are granted, from its lock-down on, in this thread, until there can be none any more. `names` reads
    /// headers of images.
    pub fn serve(self, grants: Arc<Mutex<Grants>>, names: Names) {
        // None: the original ended before, or needs nobody.
        let Ok(Some((_, descriptors))) = receive_packet(&self.hand_over, READY.len()) else { return };
        let Some(listener) = descriptors.into_iter().next() else { return };
        if send_packet(&self.hand_over, READY, &[]).is_err() {
            return;
        }
        drop(self.hand_over);
        let memory = Memory::new(self.memory);
        let listener = listener.into();
        Desk { listener, memory, caller: self.caller, grants, names, refused: 0 }.serve();
    }
}

/// Whether the kernel has as much of Landlock as it began with.
fn has_landlock() -> bool {
    let rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    rules.handle_access(AccessFs::from_all(ABI::V1)).and_then(|rules| rules.create()).is_ok()
}

/// Puts this thread under Landlock: nothing of what the kernel can restrict is left.
fn restrict() -> Result<(), Unavailable> {
    let newest = ABI::V10;
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(newest))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(newest)))
        .and_then(|rules| rules.scope(Scope::from_all(newest)))
        .and_then(|rules| rules.create())
        .and_then(|rules| rules.restrict_self())
        .map_err(|err| Unavailable::new("cannot restrict this process with Landlock", err))?;
    if restricted.ruleset == RulesetStatus::NotEnforced {
        return Err(Unavailable("Landlock is there, but doesn't restrict this process".into()));
    }
    Ok(())
}
