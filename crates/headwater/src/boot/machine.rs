//! The machine: which QEMU, and what it is told.

use crate::address::{Address, VhostAddress};
use crate::failure::{Failure, Outcome};
use headwater_export::vhost::BlkOptions;
use headwater_nbd::{NbdAddress, NbdUri};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// What the disk is called over NBD.
const EXPORT: &str = "disk";

/// Where distributions put the program if not among the others.
const ELSEWHERE: &str = "/usr/libexec/qemu-kvm";

/// Options with which a user says where the console or the screen is to be.
const SCREENS: [&str; 7] = ["-nographic", "-display", "-serial", "-monitor", "-vnc", "-spice", "-curses"];

/// A machine whose disk is behind a socket of ours.
pub(super) struct Machine {
    pub(super) program: PathBuf,
    /// The processor runs the guest. Its disk is then behind vhost-user-blk, otherwise behind NBD: QEMU translates a guest's code itself where it must,
    /// and doesn't notice that code is written over by another process. Boot loaders do that to themselves.
    pub(super) kvm: bool,
    /// In bytes.
    pub(super) memory: u64,
    pub(super) cpus: u16,
    pub(super) socket: PathBuf,
    /// What the user adds.
    pub(super) more: Vec<OsString>,
}

impl Machine {
    /// Starts it, with this terminal.
    ///
    /// # Errors
    /// If the program can't be run.
    pub(super) fn start(&self) -> Outcome<Child> {
        let started = Command::new(&self.program).args(self.arguments()).spawn();
        started.map_err(|err| Failure::new(format!("cannot run {}: {err}", self.program.display())))
    }

    /// Where the disk must be served.
    pub(super) fn address(&self) -> Address {
        let path = self.socket.clone();
        if self.kvm {
            let options = BlkOptions { queues: self.cpus, ..BlkOptions::default() };
            return Address::VhostUserBlk(VhostAddress { path, options });
        }
        Address::Nbd(NbdUri { address: NbdAddress::Unix { path }, export: EXPORT.into(), tls: None })
    }

    fn arguments(&self) -> Vec<OsString> {
        let (memory, cpus) = (self.memory, self.cpus);
        let accel = if self.kvm { "kvm" } else { "tcg" };
        let board = if cfg!(target_arch = "x86_64") { "q35" } else { "virt" };
        // Commas in option values are doubled.
        let socket = self.socket.to_string_lossy().replace(',', ",,");
        let mut words: Vec<OsString> = [
            "-machine".into(),
            format!("{board},accel={accel}"),
            "-cpu".into(),
            (if self.kvm { "host" } else { "max" }).into(),
            "-smp".into(),
            cpus.to_string(),
            "-m".into(),
            format!("{memory}B"),
        ]
        .map(OsString::from)
        .to_vec();
        let disk = if self.kvm {
            // Only what others share must be shared.
            vec![
                "-object".into(),
                format!("memory-backend-memfd,id=headwater-memory,size={memory}B,share=on"),
                "-machine".into(),
                "memory-backend=headwater-memory".into(),
                "-chardev".into(),
                format!("socket,id=headwater,reconnect=1,path={socket}"),
                "-device".into(),
                format!("vhost-user-blk-pci,chardev=headwater,num-queues={cpus},bootindex=1"),
            ]
        } else {
            let server = format!("server.type=unix,server.path={socket},export={EXPORT}");
            vec![
                "-blockdev".into(),
                format!("driver=nbd,node-name=headwater,{server},discard=unmap,reconnect-delay=10"),
                "-device".into(),
                format!("virtio-blk-pci,drive=headwater,num-queues={cpus},bootindex=1"),
            ]
        };
        words.extend(disk.into_iter().map(OsString::from));
        let chosen = |word: &OsString| SCREENS.iter().any(|screen| word == OsStr::new(screen));
        if !self.more.iter().any(chosen) {
            words.push("-nographic".into());
        }
        words.extend(self.more.iter().cloned());
        words
    }
}

/// The program: the one that is named, or the first that there is.
///
/// # Errors
/// If there is none that can be run. Nothing has been made by then.
pub(super) fn find(named: Option<&Path>) -> Outcome<PathBuf> {
    let runs = |program: &PathBuf| {
        program.is_file() && rustix::fs::access(program, rustix::fs::Access::EXEC_OK).is_ok()
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = |name: &Path| std::env::split_paths(&path).map(|directory| directory.join(name)).find(runs);
    if let Some(named) = named {
        // As a shell takes it: a name is looked for, a path is not.
        let is_name =
            named.components().count() == 1 && !named.as_os_str().as_encoded_bytes().contains(&b'/');
        let found = if is_name { in_path(named) } else { Some(named.to_owned()).filter(runs) };
        return found.ok_or_else(|| {
            Failure::new(format!("--qemu: there is no program {} that can be run", named.display()))
        });
    }
    let name = format!("qemu-system-{}", std::env::consts::ARCH);
    let found = in_path(Path::new(&name)).or_else(|| Some(PathBuf::from(ELSEWHERE)).filter(runs));
    found.ok_or_else(|| {
        Failure::new(format!(
            "{name} isn't on this machine (Debian: apt install qemu-system-x86); or say --qemu PROGRAM"
        ))
    })
}

/// Whether the processor runs guests itself. The device alone says too little: it is also there where another hypervisor makes it slower than no help.
pub(super) fn has_kvm() -> bool {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let loaded = ["kvm_intel", "kvm_amd"].iter().any(|module| Path::new("/sys/module").join(module).exists());
    device.is_ok() && (loaded || cfg!(not(target_arch = "x86_64")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(kvm: bool, more: &[&str]) -> Vec<String> {
        let machine = Machine {
            program: "qemu".into(),
            kvm,
            memory: 1 << 30,
            cpus: 3,
            socket: "/tmp/a,b/disk.sock".into(),
            more: more.iter().map(OsString::from).collect(),
        };
        machine.arguments().into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn the_console_is_the_terminal_unless_the_user_says_otherwise() {
        assert!(machine(false, &[]).contains(&"-nographic".to_owned()));
        assert!(machine(false, &["-kernel", "vmlinuz"]).contains(&"-nographic".to_owned()));
        let chosen = machine(false, &["-display", "gtk"]);
        assert!(
            !chosen.contains(&"-nographic".to_owned())
                && chosen.ends_with(&["-display".into(), "gtk".into()])
        );
    }

    #[test]
    fn commas_in_the_sockets_path_are_no_ends() {
        for kvm in [false, true] {
            assert!(machine(kvm, &[]).iter().any(|word| word.contains("path=/tmp/a,,b/disk.sock")));
        }
    }

    #[test]
    fn without_kvm_nobody_shares_the_guests_memory() {
        let words = |kvm| machine(kvm, &[]).join(" ");
        assert!(words(true).contains("vhost-user-blk-pci") && words(true).contains("accel=kvm"));
        assert!(words(true).contains("memory-backend-memfd") && words(true).contains("share=on"));
        assert!(!words(false).contains("vhost") && words(false).contains("accel=tcg"));
        assert!(!words(false).contains("memory-backend"));
        assert!(words(false).contains("virtio-blk-pci,drive=headwater,num-queues=3,bootindex=1"));
    }
}
