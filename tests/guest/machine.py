"""A Linux guest: a kernel and busybox of Debian's packages, unpacked beside the build, and a QEMU machine that runs them."""

import fcntl
import lzma
import pathlib
import re
import subprocess
import tempfile
import threading
import time

TREE = pathlib.Path(__file__).resolve().parents[2]
TOOLS = TREE / "target" / "tools" / "guest"
# What is built into Debian's cloud kernel need not be loaded.
MODULES = ("virtio_pci", "virtio_blk")


class Failed(Exception):
    """A test didn't turn out as it must."""


def check(condition, message):
    if not condition:
        raise Failed(message)


def run(*words, **options):
    """Runs a program that must succeed; gives what it prints."""
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, **options)
    check(done.returncode == 0, f"{' '.join(str(word) for word in words)}: {done.stdout}")
    return done.stdout


def qemu():
    """The path of a qemu-system."""
    # What is said on the way goes past us.
    found = subprocess.run([TREE / "scripts" / "qemu-system"], stdout=subprocess.PIPE, text=True, check=True)
    return found.stdout.strip()


def _usual_kernel():
    """Debian's own."""
    depends = run("apt-cache", "depends", "linux-image-cloud-amd64")
    return re.search(r"Depends: (linux-image-\S+)", depends)


def _newer_kernel():
    """One that Debian's security team keeps beside its own: it has the ublk driver."""
    found = run("apt-cache", "search", "--names-only", r"^linux-image-6\.12\..*-cloud-amd64-unsigned$")
    names = re.findall(r"^(linux-image-6\.12\.(\d+)\S+)", found, re.MULTILINE)
    newest = max(names, key=lambda name: int(name[1]), default=None)
    return newest and re.match("(.*)", newest[0])


def packages(newer=False):
    """The folder with the packages' files, fetched when they aren't there."""
    root = TOOLS / ("newer-root" if newer else "root")
    if not root.exists():
        TOOLS.mkdir(parents=True, exist_ok=True)
        fetched, unpacked = TOOLS / "fetched", TOOLS / "unpacked"
        run("rm", "-rf", fetched, unpacked)
        fetched.mkdir()
        kernel = _newer_kernel() if newer else _usual_kernel()
        check(kernel, "apt knows no kernel for the guest")
        run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", kernel[1], "busybox-static", cwd=fetched)
        for package in fetched.glob("*.deb"):
            run("dpkg", "-x", package, unpacked)
        run("rm", "-rf", fetched)
        unpacked.rename(root)
    return root


def _modules(root, wanted):
    """The names and contents of the modules, in an order in which they can be loaded."""
    there = {path.name.split(".ko")[0].replace("-", "_"): path for path in root.glob("lib/modules/**/*.ko*")}
    loaded = {}

    def add(name):
        if name in loaded:
            return
        path = there[name]
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        needs = re.search(rb"\0depends=([^\0]*)\0", data)
        for need in needs[1].decode().split(",") if needs else ():
            if need:
                add(need.replace("-", "_"))
        loaded[name] = data

    for module in wanted:
        if module in there:
            add(module)
    return loaded


def _program(path):
    """The files that a program of the host needs to run in the guest, without what only debuggers read."""
    with tempfile.NamedTemporaryFile() as stripped:
        run("strip", "-o", stripped.name, path)
        files = {f"bin/{path.name}": (0o100755, pathlib.Path(stripped.name).read_bytes())}
    for library in re.findall(r"(/\S+) \(0x", run("ldd", path)):
        for folder in reversed(pathlib.PurePath(library).parents[:-1]):
            files[str(folder)[1:]] = (0o040755, b"")
        files[library[1:]] = (0o100755, pathlib.Path(library).read_bytes())
    return files


def _archive(files):
    """A cpio archive, as kernels unpack it: folders and files by name, with their modes."""
    out = bytearray()
    for number, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + path
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def boot_files(init=None, program=None):
    """Kernel and initial memory disk; `init` is what runs there, if it isn't the tests' own. With `program`, a headwater of the host, that is
    there as well, and the ublk driver.
    """
    TOOLS.mkdir(parents=True, exist_ok=True)
    with open(TOOLS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = packages(newer=program is not None)
        busybox = (root / "bin" / "busybox").read_bytes()
        files = {name: (0o040755, b"") for name in ("bin", "dev", "modules", "proc", "sys", "mnt")}
        files["bin/busybox"] = (0o100755, busybox)
        for applet in run(root / "bin" / "busybox", "--list").split():
            if applet != "busybox":
                files[f"bin/{applet}"] = (0o120777, b"busybox")
        if program:
            files |= _program(program)
        modules = _modules(root, MODULES + (("ublk_drv",) if program else ()))
        for name, data in modules.items():
            files[f"modules/{name}.ko"] = (0o100644, data)
        files["modules/order"] = (0o100644, "".join(f"{name}.ko\n" for name in modules).encode())
        files["init"] = (0o100755, init or (pathlib.Path(__file__).parent / "init").read_bytes())
        memory_disk = TOOLS / ("other-initramfs" if init else "newer-initramfs" if program else "initramfs")
        memory_disk.write_bytes(_archive(files))
        kernel = next(root.glob("boot/vmlinuz-*"))
    return kernel, memory_disk


class Machine:
    """A running machine. `disks` are QEMU's options for its disks, `work` is what the guest is to do: words for its command line.

    `command` starts it instead of a QEMU of our own, and gives it its disk, its memory and its processors. With `program`, a headwater of the
    host runs in the guest, which has more memory then.
    """

    MEMORY = "256M"

    def __init__(self, disks, log, command=None, program=None, **work):
        kernel, memory_disk = boot_files(program=program)
        memory = "1G" if program else self.MEMORY
        words = " ".join(f"{key}={value}" for key, value in work.items())
        hardware = [
            *["-machine", "q35,memory-backend=memory", "-accel", "tcg", "-m", memory, "-smp", "2"],
            *["-object", f"memory-backend-memfd,id=memory,size={memory},share=on"],
        ]
        self._log = open(log, "wb")
        self._said, self._changed = [], threading.Condition()
        self.child = subprocess.Popen(
            [
                *(command or [qemu(), *hardware]),
                *["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"],
                *["-kernel", kernel, "-initrd", memory_disk],
                *["-append", f"console=ttyS0 quiet panic=-1 rdinit=/init {words}"],
                *disks,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.child.stdout:
            self._log.write(line)
            self._log.flush()
            text = line.decode(errors="replace").strip()
            if "guest: " in text:
                with self._changed:
                    self._said.append(text.split("guest: ", 1)[1])
                    self._changed.notify_all()
        with self._changed:
            self._said.append(None)
            self._changed.notify_all()

    def said(self):
        """What the guest has said so far."""
        with self._changed:
            return [line for line in self._said if line is not None]

    def wait(self, pattern, count=1, patience=120):
        """Waits until the guest has said something that matches so many times; gives the last match."""
        end = time.monotonic() + patience
        with self._changed:
            while True:
                lines = [line for line in self._said if line is not None]
                failed = [line for line in lines if line.startswith("failed")]
                check(not failed, f"the guest: {failed}")
                matches = [match for line in lines if (match := re.fullmatch(pattern, line))]
                if len(matches) >= count:
                    return matches[count - 1]
                check(self._said[-1:] != [None], f"the machine ended, and the guest had said {lines[-5:]}; see {self._log.name}")
                left = end - time.monotonic()
                check(left > 0, f"the guest doesn't say {pattern}, but {lines[-5:]}; see {self._log.name}")
                self._changed.wait(left)

    def wait_for_end(self):
        """Waits until the guest is done and the machine off."""
        self.wait("done")
        self.child.wait(60)
        self._close()

    def kill(self):
        """Kills it."""
        self.child.kill()
        self.child.wait()
        self._close()

    def _close(self):
        self._reader.join()
        self.child.stdout.close()
        self._log.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.child.poll() is None:
            self.kill()
