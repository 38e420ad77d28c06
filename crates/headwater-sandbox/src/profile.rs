//! What the data plane may call, and what the broker may not.
//!
//! A call of the data plane is in one of four groups: [`ALLOWED`] goes on; those with [`conditions`] go on with some arguments;
//! [`ASKED`] stop until the broker has made them; all others fail with `ENOSYS`, as in a kernel that doesn't have them, because that is the
//! error for which the C library knows another way (`clone3` must fail so: its flags are in memory, where no filter sees them).

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// Calls that reach nothing outside but what descriptors stand for, or tell what anybody may know (a file's size).
const ALLOWED: &[c_long] = &[
    // Bytes of descriptors.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_copy_file_range,
    libc::SYS_splice,
    libc::SYS_io_uring_enter,
    // Descriptors.
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_memfd_create,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    // Of this process: Landlock lets no other be reached.
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    // What is told of files; Landlock doesn't judge it either.
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_statfs,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    // Sockets that there are.
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Threads and signals.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigpending,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_prctl,
    libc::SYS_getrlimit,
    // Time, chance, and who one is.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_umask,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_select,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

/// Calls that name something: the broker makes them.
const ASKED: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_mount,
    libc::SYS_umount2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    libc::SYS_renameat,
];

/// What neither the broker does nor a process that works alone: it starts nothing, and looks into nobody who hasn't asked for it.
const NEVER: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
];

/// Stands in a program for the answer that seccompiler has no word for; see [`asking`].
const MARK: u32 = 0x4857;

/// What the broker never does, denied. It needs no ring either.
///
/// # Errors
/// Those of seccompiler, and on a processor that it doesn't know.
pub(crate) fn broker() -> Result<BpfProgram, seccompiler::BackendError> {
    without(&[libc::SYS_io_uring_setup])
}

/// What a process that works alone never does, denied: it mounts nothing either.
///
/// # Errors
/// As [`broker`].
pub(crate) fn alone() -> Result<BpfProgram, seccompiler::BackendError> {
    without(&[libc::SYS_mount, libc::SYS_umount2])
}

/// [`NEVER`] and some more, denied.
fn without(more: &[c_long]) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: Rules = NEVER.iter().chain(more).map(|number| (*number, Vec::new())).collect();
    let other_process = when(&[(0, Op::MaskedEq(libc::CLONE_THREAD as u64), 0)])?;
    rules.insert(libc::SYS_clone, vec![other_process]);
    let errno = |code: i32| SeccompAction::Errno(code.cast_unsigned());
    // As for the data plane: the flags of the newer call can't be seen.
    rules.insert(libc::SYS_clone3, Vec::new());
    SeccompFilter::new(rules, SeccompAction::Allow, errno(libc::ENOSYS), arch()?)?.try_into()
}

/// Calls in [`ASKED`] stop; others aren't judged.
///
/// # Errors
/// As [`broker`].
pub(crate) fn asking() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules: Rules = ASKED.iter().map(|number| (*number, Vec::new())).collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Trace(MARK), arch()?)?;
    let mut program: BpfProgram = filter.try_into()?;
    let mark = libc::SECCOMP_RET_TRACE | MARK;
    for instruction in &mut program {
        if instruction.code == RETURN && instruction.k == mark {
            instruction.k = libc::SECCOMP_RET_USER_NOTIF;
        }
    }
    Ok(program)
}

/// The instruction that ends a program with a constant.
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// All that the process `own` may call, [`ASKED`] included.
///
/// # Errors
/// As [`broker`].
pub(crate) fn data_plane(own: u32) -> Result<BpfProgram, seccompiler::BackendError> {
    let always = ALLOWED.iter().chain(ASKED).map(|number| (*number, Vec::new()));
    let mut rules: Rules = always.collect();
    rules.extend(conditions(own)?);
    let refuse = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, arch()?)?.try_into()
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// Calls that are allowed with some arguments only.
fn conditions(own: u32) -> Result<Rules, seccompiler::BackendError> {
    let number = |value: i32| u64::from(value.cast_unsigned());
    let kind = |kind: i32| (1, Op::MaskedEq(0xf), number(kind));
    let domain = |domain: i32| (0, Op::Eq, number(domain));
    let inet = [libc::AF_INET, libc::AF_INET6]
        .into_iter()
        .flat_map(|of| [libc::SOCK_STREAM, libc::SOCK_DGRAM].map(|is| when(&[domain(of), kind(is)])));
    let unix = when(&[domain(libc::AF_UNIX), kind(libc::SOCK_STREAM)]);
    let sockets: Result<Vec<_>, _> = inet.chain([unix]).collect();
    // Connects on the way, past the broker, if it were allowed.
    let plain = |flags_at: u8| (flags_at, Op::MaskedEq(number(libc::MSG_FASTOPEN)), 0);
    // Puts words into the mouth of whoever sits at the terminal.
    let no_terminal = [libc::TIOCSTI, libc::TIOCLINUX].map(|request| (1, Op::Ne, request));
    let own = u64::from(own);
    Ok(Rules::from([
        (libc::SYS_socket, sockets?),
        (libc::SYS_socketpair, vec![when(&[domain(libc::AF_UNIX), kind(libc::SOCK_STREAM)])?]),
        (libc::SYS_sendto, vec![when(&[plain(3)])?]),
        (libc::SYS_sendmsg, vec![when(&[plain(2)])?]),
        (libc::SYS_sendmmsg, vec![when(&[plain(3)])?]),
        (libc::SYS_ioctl, vec![when(&no_terminal)?]),
        // A thread, not a process.
        (
            libc::SYS_clone,
            vec![when(&[(0, Op::MaskedEq(number(libc::CLONE_THREAD)), number(libc::CLONE_THREAD))])?],
        ),
        // To abort.
        (libc::SYS_tgkill, vec![when(&[(0, Op::Eq, own)])?]),
        (libc::SYS_prlimit64, vec![when(&[(0, Op::Eq, 0)])?, when(&[(0, Op::Eq, own)])?]),
    ]))
}

/// All of these hold of the lower halves of the arguments.
fn when(conditions: &[(u8, Op, u64)]) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions =
        conditions.iter().map(|(at, op, value)| SeccompCondition::new(*at, Len::Dword, op.clone(), *value));
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}

fn arch() -> Result<TargetArch, seccompiler::BackendError> {
    std::env::consts::ARCH.try_into()
}
