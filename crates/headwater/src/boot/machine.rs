//! The machine: which QEMU, and what it is told.

use crate::failure::{Failure, Outcome};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// Where distributions put the program if not among the others.
const ELSEWHERE: &str = "/usr/libexec/qemu-kvm";

/// Options with which a user says where the console or the screen is to be.
const SCREENS: [&str; 7] = ["-nographic", "-display", "-serial", "-monitor", "-vnc", "-spice", "-curses"];

/// A machine whose disk is behind a vhost-user-blk socket.
pub(super) struct Machine {
    pub(super) program: PathBuf,
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
        let started = Command::new(&self.program).args(self.arguments(has_kvm())).spawn();
        started.map_err(|err| Failure::new(format!("cannot run {}: {err}", self.program.display())))
    }

    fn arguments(&self, kvm: bool) -> Vec<OsString> {
        let (memory, cpus) = (self.memory, self.cpus);
        let accel = if kvm { "kvm" } else { "tcg" };
        let board = if cfg!(target_arch = "x86_64") { "q35" } else { "virt" };
        // Commas in option values are doubled.
        let mut chardev = OsString::from("socket,id=headwater,reconnect=1,path=");
        chardev.push(self.socket.to_string_lossy().replace(',', ",,"));
        let mut words: Vec<OsString> = [
            "-machine".into(),
            format!("{board},accel={accel},memory-backend=headwater-memory"),
            "-cpu".into(),
            (if kvm { "host" } else { "max" }).into(),
            "-smp".into(),
            cpus.to_string(),
            "-m".into(),
            format!("{memory}B"),
            "-object".into(),
            format!("memory-backend-memfd,id=headwater-memory,size={memory}B,share=on"),
            "-chardev".into(),
        ]
        .map(OsString::from)
        .to_vec();
        words.push(chardev);
        words.push("-device".into());
        words.push(format!("vhost-user-blk-pci,chardev=headwater,num-queues={cpus},bootindex=1").into());
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
/// If there is none.
pub(super) fn find(named: Option<&Path>) -> Outcome<PathBuf> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    let name = format!("qemu-system-{}", std::env::consts::ARCH);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).map(|directory| directory.join(&name));
    let found = places.chain([PathBuf::from(ELSEWHERE)]).find(|program| program.is_file());
    found.ok_or_else(|| {
        Failure::new(format!(
            "{name} isn't on this machine (Debian: apt install qemu-system-x86); or say --qemu PROGRAM"
        ))
    })
}

/// Whether the processor runs guests itself. The device alone says too little: it is also there where another hypervisor makes it slower than no help.
fn has_kvm() -> bool {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let loaded = ["kvm_intel", "kvm_amd"].iter().any(|module| Path::new("/sys/module").join(module).exists());
    device.is_ok() && (loaded || cfg!(not(target_arch = "x86_64")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(more: &[&str]) -> Vec<String> {
        let machine = Machine {
            program: "qemu".into(),
            memory: 1 << 30,
            cpus: 3,
            socket: "/tmp/a,b/disk.sock".into(),
            more: more.iter().map(OsString::from).collect(),
        };
        machine.arguments(false).into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn the_console_is_the_terminal_unless_the_user_says_otherwise() {
        assert!(machine(&[]).contains(&"-nographic".to_owned()));
        assert!(machine(&["-kernel", "vmlinuz"]).contains(&"-nographic".to_owned()));
        let chosen = machine(&["-display", "gtk"]);
        assert!(
            !chosen.contains(&"-nographic".to_owned())
                && chosen.ends_with(&["-display".into(), "gtk".into()])
        );
    }

    #[test]
    fn commas_in_the_sockets_path_are_no_ends() {
        assert!(
            machine(&[]).contains(&"socket,id=headwater,reconnect=1,path=/tmp/a,,b/disk.sock".to_owned())
        );
    }
}
