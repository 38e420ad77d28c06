//! What a data plane can do that somebody else has taken over: code of the attacker's runs in it, with everything that it has.
//!
//! This process becomes the two that a program becomes, and after the lock-down tries to get out, by every way that seemed promising. It has
//! no threads of a test harness, because it is forked; it is listed and run as one test.

use headwater_sandbox::{DataPlane, Grants, Named, Side, Word, send_packet, split};
use io_uring::{IoUring, opcode, types};
use rustix::fs::{AtFlags, Mode, OFlags};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let has = |arg: &str| args.iter().any(|given| given == arg);
    if has("--list") {
        if !has("--ignored") {
            println!("a_data_plane_that_was_taken_over_stays_where_it_is: test");
        }
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let scene = Scene::new(directory.path().canonicalize().unwrap());
    // Set up before the lock-down as the engine's is, but without its restrictions: the worst that could be found.
    let ring = IoUring::new(4).ok();
    match split() {
        Err(why) => println!("skipped: no sandbox here: {why}"),
        Ok(Side::Broker(broker)) => {
            // The broker runs no programs either. If it could, the data plane would find nobody at the other end.
            assert!(std::process::Command::new("/bin/true").status().is_err());
            let grants = scene.grants();
            let life = broker.clone_life().unwrap();
            std::thread::spawn(move || broker.serve(Arc::new(Mutex::new(grants)), Box::new(names)));
            // Whatever comes here is nothing to a broker that knows no words.
            let mut life = UnixStream::from(life);
            while life.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
            std::process::exit(0);
        }
        Ok(Side::DataPlane(mut plane)) => {
            plane.lock_down().unwrap();
            scene.attempt(&plane, ring);
            // Also what a thread may is no more than that.
            std::thread::scope(|scope| {
                scope.spawn(|| scene.attempt(&plane, None));
            });
            plane.end();
            assert!(File::open(scene.at("said")).is_err(), "nobody is left who opens files");
            std::mem::forget(directory);
        }
    }
}

/// A header names what comes after its first bytes.
fn names(file: &File, path: &Path) -> Vec<Named> {
    let mut bytes = [0; 64];
    let read = file.read_at(&mut bytes, 0).unwrap();
    let text = String::from_utf8_lossy(&bytes[..read]);
    let name = text.strip_prefix("image of ").map(|name| path.with_file_name(name.trim()));
    name.map(|path| Named { path, header: true }).into_iter().collect()
}

/// The number of a descriptor that the operator names.
const INHERITED: i32 = 100;

struct Scene {
    directory: PathBuf,
    monitor: TcpListener,
    other: TcpListener,
    _socket: UnixListener,
    terminal: Option<File>,
}

/// What there is of numbers beyond those that `libc` gives a call for.
fn raw(number: i64, args: [u64; 6]) -> io::Error {
    let [a, b, c, d, e, f] = args;
    // SAFETY: those who call this hand over addresses of memory that is theirs; what the kernel must refuse changes none of it.
    let done = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    assert_eq!(done, -1, "system call {number} was made");
    io::Error::last_os_error()
}

impl Scene {
    fn new(directory: PathBuf) -> Self {
        for (name, text) in [
            ("said", "said"),
            ("unrelated", "secret"),
            ("image", "image of base"),
            ("base", "base"),
            ("free", ""),
            ("below", ""),
        ] {
            fs::write(directory.join(name), text).unwrap();
        }
        symlink("unrelated", directory.join("link")).unwrap();
        fs::create_dir(directory.join("state")).unwrap();
        Self {
            monitor: TcpListener::bind("127.0.0.1:0").unwrap(),
            other: TcpListener::bind("127.0.0.1:0").unwrap(),
            _socket: UnixListener::bind(directory.join("socket")).unwrap(),
            terminal: File::open("/dev/ptmx").ok(),
            directory,
        }
    }

    fn grants(&self) -> Grants {
        let mut grants = Grants::new(self.directory.clone());
        grants.hear(Word::File(self.at("said")));
        grants.hear(Word::Image(self.at("image")));
        grants.hear(Word::State(self.at("state")));
        grants.hear(Word::MountPoint(self.at("below")));
        grants.hear(Word::File(format!("/dev/fd/{INHERITED}").into()));
        grants.keep_from(self.monitor.local_addr().unwrap().port());
        grants
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn attempt(&self, plane: &DataPlane, ring: Option<IoUring>) {
        self.what_was_said_is_to_be_had();
        self.files_by_their_names();
        self.a_descriptor_that_was_exchanged();
        self.files_by_other_calls();
        if let Some(ring) = ring {
            self.files_by_a_ring(ring);
        }
        self.mounts();
        self.a_name_that_changes();
        self.changes();
        self.programs();
        self.processes();
        self.sockets();
        self.the_broker(plane);
        self.what_was_said_is_to_be_had();
    }

    fn what_was_said_is_to_be_had(&self) {
        let mut file = OpenOptions::new().read(true).write(true).open(self.at("said")).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "said");
        assert_eq!(fs::read_to_string(self.at("image")).unwrap(), "image of base");
        assert_eq!(fs::read_to_string(self.at("base")).unwrap(), "base");
        // A directory for state, by its descriptor.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let state = rustix::fs::open(self.at("state"), flags, Mode::empty()).unwrap();
        let make = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        drop(rustix::fs::openat(&state, "job.new", make, Mode::RUSR | Mode::WUSR).unwrap());
        rustix::fs::renameat(&state, "job.new", &state, "job").unwrap();
        assert!(rustix::fs::openat(&state, "../unrelated", OFlags::RDONLY, Mode::empty()).is_err());
        assert!(rustix::fs::renameat(&state, "job", &state, "../job").is_err());
        rustix::fs::unlinkat(&state, "job", AtFlags::empty()).unwrap();
        // What a line of work takes: memory, threads, descriptors.
        std::thread::spawn(|| vec![1_u8; 1 << 20].len()).join().unwrap();
        drop(io::pipe().unwrap());
    }

    fn files_by_their_names(&self) {
        let broker = std::process::id() + 1;
        let names = [
            self.at("unrelated"),
            self.at("link"),
            self.at("said/../unrelated"),
            self.at("image/../unrelated"),
            self.directory.clone().join("..").join("x"),
            "/etc/shadow".into(),
            "/etc/passwd".into(),
            "/proc/self/mem".into(),
            "/proc/1/environ".into(),
            "/dev/mem".into(),
            "/dev/kmsg".into(),
            format!("/proc/{broker}/mem").into(),
            format!("/proc/{}/fd/0", std::process::id()).into(),
            "/".into(),
        ];
        for name in names {
            assert!(File::open(&name).is_err(), "{} was opened", name.display());
            let written = OpenOptions::new().write(true).create(true).truncate(false).open(&name);
            assert!(written.is_err(), "{} was opened for writing", name.display());
        }
        assert!(File::open(self.at("unrelated")).unwrap_err().kind() == io::ErrorKind::PermissionDenied);
        assert!(!self.at("new").exists() && File::create_new(self.at("new")).is_err());
    }

    /// The operator named a descriptor that was inherited; now something else has its number.
    fn a_descriptor_that_was_exchanged(&self) {
        let public = File::open("/etc/hosts").unwrap();
        // SAFETY: nobody here owns this number.
        assert_eq!(unsafe { libc::dup2(public.as_raw_fd(), INHERITED) }, INHERITED);
        let name = format!("/dev/fd/{INHERITED}");
        assert!(File::open(&name).is_ok());
        assert!(OpenOptions::new().write(true).open(&name).is_err());
        assert!(OpenOptions::new().read(true).write(true).open(&name).is_err());
        assert!(OpenOptions::new().write(true).truncate(true).open(&name).is_err());
        // SAFETY: as above.
        assert_eq!(unsafe { libc::close(INHERITED) }, 0);
        assert!(File::open(&name).is_err());
    }

    fn files_by_other_calls(&self) {
        let path = CString::new(self.at("unrelated").to_str().unwrap()).unwrap();
        let (here, at) = (i64::from(libc::AT_FDCWD) as u64, path.as_ptr() as u64);
        // Of the directory of an image the entries may be read.
        let directory =
            OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&self.directory).unwrap();
        let relative = c"unrelated".as_ptr() as u64;
        raw(libc::SYS_openat, [directory.as_raw_fd() as u64, relative, 0, 0, 0, 0]);
        raw(libc::SYS_openat, [here, at, 0, 0, 0, 0]);
        let how = [0_u64; 3];
        raw(libc::SYS_openat2, [here, at, how.as_ptr() as u64, 24, 0, 0]);
        raw(libc::SYS_open_by_handle_at, [directory.as_raw_fd() as u64, how.as_ptr() as u64, 0, 0, 0, 0]);
        raw(libc::SYS_open_tree, [here, at, 0, 0, 0, 0]);
        raw(libc::SYS_mount, [at, at, at, 0, 0, 0]);
        raw(libc::SYS_chroot, [at, 0, 0, 0, 0, 0]);
        raw(libc::SYS_fchdir, [directory.as_raw_fd() as u64, 0, 0, 0, 0, 0]);
        raw(libc::SYS_swapon, [at, 0, 0, 0, 0, 0]);
        raw(libc::SYS_acct, [at, 0, 0, 0, 0, 0]);
        for number in [libc::SYS_openat, libc::SYS_unlinkat, libc::SYS_connect, libc::SYS_bind] {
            // Addresses that lead nowhere, and lengths that are none.
            raw(number, [here, 8, 1, u64::MAX, 0, 0]);
            raw(number, [u64::MAX, u64::MAX, u64::MAX, u64::MAX, u64::MAX, u64::MAX]);
        }
        // The other way into the kernel that this processor has, with numbers of its own.
        #[cfg(target_arch = "x86_64")]
        raw(0x4000_0000 | libc::SYS_openat, [here, at, 0, 0, 0, 0]);
    }

    /// Where the operator wants a disk as a file, FUSE may be mounted, and nothing else; and nowhere else.
    fn mounts(&self) {
        use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
        let fuse = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        let number = fuse.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let data = CString::new(format!("fd={number},rootmode=100000,user_id=0,group_id=0")).unwrap();
        let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let try_mount = |at: &Path, kind: &str, flags, data: &CString| {
            mount("x", at, kind, flags, data.as_c_str()).is_ok()
        };
        for elsewhere in
            [self.at("said"), self.at("unrelated"), self.at("below/../said"), "/etc/hosts".into(), "/".into()]
        {
            assert!(!try_mount(&elsewhere, "fuse.headwater", quiet, &data), "{}", elsewhere.display());
            assert!(unmount(&elsewhere, UnmountFlags::DETACH).is_err(), "{}", elsewhere.display());
        }
        let at = self.at("below");
        assert!(!try_mount(&at, "tmpfs", quiet, &data) && !try_mount(&at, "proc", quiet, &data));
        assert!(
            !try_mount(&at, "fuse.headwater", MountFlags::empty(), &data),
            "programs with rights of others"
        );
        assert!(
            !try_mount(&at, "fuse.headwater", quiet | MountFlags::BIND, &data),
            "something else that is there"
        );
        let other = CString::new("fd=0,rootmode=40000,user_id=0,group_id=0").unwrap();
        assert!(!try_mount(&at, "fuse.headwater", quiet, &other), "a directory");
        // Who may not mount, or has no FUSE, has no more than that either.
        if fuse.is_ok() && try_mount(&at, "fuse.headwater", quiet, &data) {
            unmount(&at, UnmountFlags::DETACH).unwrap();
        }
    }

    fn files_by_a_ring(&self, mut ring: IoUring) {
        let mut open = |name: &Path| {
            let path = CString::new(name.to_str().unwrap()).unwrap();
            let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
            // SAFETY: the path lives until the completion has been taken.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        for name in [self.at("unrelated"), self.at("said"), "/etc/passwd".into()] {
            assert_eq!(open(&name), -libc::EACCES, "{}", name.display());
        }
        assert!(IoUring::new(4).is_err(), "a new ring would have sockets");
    }

    /// The broker decides about its copy of a name: one that changes meanwhile is either the one or the other.
    fn a_name_that_changes(&self) {
        let text = self.at("said").to_str().unwrap().as_bytes().to_vec();
        let start = text.len() - 4;
        let path: Vec<AtomicU8> = text.iter().copied().chain(*b"\0\0\0\0\0\0").map(AtomicU8::new).collect();
        let done = AtomicBool::new(false);
        let mut opened = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for name in [b"unrelated", b"said\0\0\0\0\0"] {
                        for (at, byte) in name.iter().enumerate() {
                            path[start + at].store(*byte, Ordering::Relaxed);
                        }
                    }
                }
            });
            for _ in 0..500 {
                // SAFETY: the bytes end with a zero at any time, and are only read, by the kernel.
                let fd = unsafe { libc::open(path.as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC) };
                if fd >= 0 {
                    opened += 1;
                    assert_eq!(content(fd), "said");
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        println!("opened {opened} times while its name changed");
    }

    fn changes(&self) {
        assert!(fs::remove_file(self.at("unrelated")).is_err());
        assert!(fs::remove_file(self.at("said")).is_err(), "it was there before");
        assert!(fs::remove_dir(&self.directory).is_err());
        assert!(fs::rename(self.at("said"), self.at("unrelated")).is_err());
        assert!(fs::rename(self.at("unrelated"), self.at("said")).is_err());
        assert!(fs::hard_link(self.at("unrelated"), self.at("linked")).is_err());
        assert!(symlink("/etc/shadow", self.at("shadow")).is_err());
        assert!(fs::create_dir(self.at("sub")).is_err());
        assert!(fs::set_permissions(self.at("unrelated"), fs::Permissions::from_mode(0o777)).is_err());
        let path = CString::new(self.at("unrelated").to_str().unwrap()).unwrap();
        raw(libc::SYS_truncate, [path.as_ptr() as u64, 0, 0, 0, 0, 0]);
        raw(
            libc::SYS_setxattr,
            [path.as_ptr() as u64, c"user.x".as_ptr() as u64, path.as_ptr() as u64, 1, 0, 0],
        );
        assert_eq!(fs::metadata(self.at("unrelated")).unwrap().len(), 6);
    }

    fn programs(&self) {
        for program in ["/bin/true", "/bin/sh", "/proc/self/exe"] {
            assert!(std::process::Command::new(program).status().is_err(), "{program} was run");
        }
        let program = c"/bin/true".as_ptr() as u64;
        let none = [0_u64; 1];
        raw(libc::SYS_execve, [program, none.as_ptr() as u64, none.as_ptr() as u64, 0, 0, 0]);
        // A program in memory needs no file.
        // SAFETY: the name ends with a zero, and the descriptor is new.
        let memory = unsafe { libc::memfd_create(c"program".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(memory >= 0);
        raw(
            libc::SYS_execveat,
            [memory as u64, c"".as_ptr() as u64, none.as_ptr() as u64, 0, libc::AT_EMPTY_PATH as u64, 0],
        );
        raw(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]);
        raw(libc::SYS_clone3, [none.as_ptr() as u64, 88, 0, 0, 0, 0]);
        #[cfg(target_arch = "x86_64")]
        for number in [libc::SYS_fork, libc::SYS_vfork] {
            raw(number, [0; 6]);
        }
        raw(libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]);
        raw(libc::SYS_bpf, [0; 6]);
        raw(libc::SYS_userfaultfd, [0; 6]);
        raw(libc::SYS_perf_event_open, [0; 6]);
        raw(libc::SYS_keyctl, [0; 6]);
        // Words for whoever sits at the terminal.
        if let Some(terminal) = &self.terminal {
            let byte = b"x".as_ptr() as u64;
            let err = raw(libc::SYS_ioctl, [terminal.as_raw_fd() as u64, libc::TIOCSTI, byte, 0, 0, 0]);
            assert_eq!(err.raw_os_error(), Some(libc::ENOSYS));
        }
    }

    fn processes(&self) {
        let parent = rustix::process::getppid().unwrap();
        // It is the next number, but who knows: any process of this user will do.
        let broker =
            rustix::process::Pid::from_raw(rustix::process::getpid().as_raw_nonzero().get() + 1).unwrap();
        for other in [broker, parent] {
            let number = other.as_raw_nonzero().get() as u64;
            raw(libc::SYS_ptrace, [16, number, 0, 0, 0, 0]);
            raw(libc::SYS_process_vm_readv, [number, 0, 0, 0, 0, 0]);
            raw(libc::SYS_process_vm_writev, [number, 0, 0, 0, 0, 0]);
            raw(libc::SYS_kill, [number, 0, 0, 0, 0, 0]);
            raw(libc::SYS_tgkill, [number, number, 0, 0, 0, 0]);
            raw(libc::SYS_prlimit64, [number, 0, 0, 0, 0, 0]);
            let flags = rustix::process::PidfdFlags::empty();
            if let Ok(process) = rustix::process::pidfd_open(other, flags) {
                let stolen =
                    rustix::process::pidfd_getfd(process, 0, rustix::process::PidfdGetfdFlags::empty());
                assert!(stolen.is_err(), "a descriptor of another process");
            }
        }
    }

    fn sockets(&self) {
        assert!(UnixStream::connect(self.at("socket")).is_err(), "a service that nobody named");
        assert!(UnixListener::bind(self.at("mine")).is_err());
        assert!(UnixDatagram::unbound().is_err(), "it would reach services without a connection");
        let raw_socket = [libc::AF_INET as u64, libc::SOCK_RAW as u64, libc::IPPROTO_ICMP as u64, 0, 0, 0];
        raw(libc::SYS_socket, raw_socket);
        raw(libc::SYS_socket, [libc::AF_NETLINK as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0]);
        raw(libc::SYS_socket, [libc::AF_VSOCK as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0]);
        // The network is there, the monitor isn't.
        assert!(TcpStream::connect(self.other.local_addr().unwrap()).is_ok());
        let monitor = self.monitor.local_addr().unwrap();
        for address in [monitor, (std::net::Ipv4Addr::UNSPECIFIED, monitor.port()).into()] {
            assert!(TcpStream::connect(address).is_err(), "{address}");
        }
        assert!(TcpListener::bind(monitor).is_err());
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let none = [0_u64; 8];
        let sent = [ours.as_raw_fd() as u64, none.as_ptr() as u64, libc::MSG_FASTOPEN as u64, 0, 0, 0];
        assert_eq!(raw(libc::SYS_sendmsg, sent).raw_os_error(), Some(libc::ENOSYS));
    }

    fn the_broker(&self, plane: &DataPlane) {
        for word in [&b"\0"[..], b"open /etc/shadow", &[0xff; 1000]] {
            // There may be no room: it says nothing to it either way.
            let _ = send_packet(plane.life(), word, &[]);
        }
        // A header that is written now names nothing: the broker has read it.
        let mut image = OpenOptions::new().write(true).truncate(true).open(self.at("image")).unwrap();
        image.write_all(b"image of unrelated").unwrap();
        assert_eq!(fs::read_to_string(self.at("image")).unwrap(), "image of unrelated");
        assert!(File::open(self.at("unrelated")).is_err());
        let mut image = OpenOptions::new().write(true).truncate(true).open(self.at("image")).unwrap();
        image.write_all(b"image of base").unwrap();
    }
}

/// What is in an open file, which is closed.
fn content(fd: RawFd) -> String {
    // SAFETY: the descriptor is new, and nobody else's.
    let mut file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}
