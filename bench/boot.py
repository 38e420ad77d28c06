"""Part (g): from the command to a guest's first user-space line, on a disk that is far away; and when all of it is here."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass

import boot_image
import far_source
import guest_waits
import images
import measure
import qemu

MEMORY = "512M"
# Sources: milliseconds for each read, and bits a second, 0 for as many as there are.
SOURCES = [(10, 400_000_000), (20, 0)]
# Seconds' worth of bytes that pass at once after a silence: by default nbdkit would give two whole seconds' worth.
BURST = 0.02
PATIENCE = 240


@dataclass
class Boot:
    """Seconds from the command on."""

    user_space: float
    ready: float
    waited: float  # for its disk, until it was ready
    local: float | None  # None for what doesn't copy


class Guest:
    """A process tree whose output has the guest's console in it, and when it said what."""

    def __init__(self, command, since, log):
        self.since, self._log = since, log
        self.heard, self._changed, self._over = {}, threading.Condition(), False
        self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with open(self._log, "wb") as log:
            for line in self.child.stdout:
                now = time.monotonic() - self.since
                log.write(line)
                log.flush()
                with self._changed:
                    self.heard.setdefault(line.decode(errors="replace").strip().split("guest: ")[-1], now)
                    self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait(self, text):
        """Waits for a line that contains a text; gives the seconds."""
        end = time.monotonic() + PATIENCE
        with self._changed:
            while True:
                for line, when in self.heard.items():
                    if text in line:
                        return when
                if self._over or time.monotonic() > end:
                    raise measure.Failed(f"the machine never said '{text}', see {self._log}")
                self._changed.wait(1)

    def end(self, how):
        """Ends it with a signal."""
        self.child.send_signal(how)
        self.child.wait()
        self._reader.join()
        self.child.stdout.close()


@contextlib.contextmanager
def machine(setup, words, since):
    """A machine of our own with these options for its disk."""
    hardware = ["-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "2", "-m", MEMORY]
    command = [setup.machine, *hardware, *CONSOLE, *guest_waits.words(trace(setup)), *words]
    guest = Guest(command, since, os.path.join(setup.folder, "console.log"))
    try:
        yield guest
    finally:
        guest.end(signal.SIGKILL)


def trace(setup):
    """Where a machine's requests are traced."""
    return os.path.join(setup.folder, "boot.trace")


CONSOLE = ["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]


def of_file(path, form):
    """A disk that the machine opens by itself."""
    return ["-drive", f"if=none,id=disk,file={path},format={form}", "-device", "virtio-blk-pci,drive=disk,bootindex=1"]


def of_socket(path):
    """A disk behind an NBD server: without KVM a boot loader can't be read through vhost-user-blk."""
    node = f"driver=nbd,node-name=disk,server.type=unix,server.path={path},export=disk,discard=unmap"
    return ["-blockdev", node, "-device", "virtio-blk-pci,drive=disk,bootindex=1,num-queues=2"]


def programs(setup, source, uri, socket):
    """The ways to a running guest, by name, each a function of nothing."""
    disk, log = os.path.join(setup.folder, "boot.out"), os.path.join(setup.folder, "boot.log")
    here = os.path.join(setup.folder, "boot.sock")

    def fresh():
        for path in (disk, here, trace(setup), os.path.join(setup.folder, ".boot.out.headwater")):
            if os.path.exists(path):
                os.unlink(path)

    def seen(guest, local):
        user_space, ready = guest.wait("user space"), guest.wait("ready")
        return Boot(user_space, ready, guest_waits.of(trace(setup)), local)

    def download():
        fresh()
        since = time.monotonic()
        measure.run(["qemu-img", *"convert -W -m 16 -f raw -O qcow2".split(), uri, disk], log)
        local = time.monotonic() - since
        with machine(setup, of_file(disk, "qcow2"), since) as guest:
            return seen(guest, local)

    def storage_daemon(streams):
        fresh()
        since = time.monotonic()
        images.qemu("qemu-img", "create", "-q", "-f", "qcow2", disk, str(os.path.getsize(source)))
        daemon = qemu.StorageDaemon(log)
        try:
            daemon.add(driver="nbd", node_name="source", server={"type": "unix", "path": socket}, read_only=True)
            daemon.add(**qemu.protocol_node("overlay-file", disk))
            daemon.add(driver="qcow2", node_name="overlay", file="overlay-file", backing="source", discard="unmap")
            daemon.command("nbd-server-start", addr={"type": "unix", "data": {"path": here}})
            daemon.command("block-export-add", type="nbd", id="e", name="disk", writable=True, **{"node-name": "overlay"})
            if streams:
                daemon.command("block-stream", **{"job-id": "stream", "device": "overlay"})
            with machine(setup, of_socket(here), since) as guest:
                if not streams:
                    return seen(guest, None)
                done = daemon.wait_for("BLOCK_JOB_COMPLETED")
                local = time.monotonic() - since
                if "error" in done:
                    raise measure.Failed(f"block-stream: {done['error']}")
                return seen(guest, local)
        finally:
            daemon.quit()

    def headwater():
        fresh()
        words = [setup.headwater, "boot", uri, disk, "--memory", MEMORY, "--qemu", setup.machine, "--", *CONSOLE]
        words += guest_waits.words(trace(setup))
        guest = Guest(words, time.monotonic(), log)
        try:
            return seen(guest, guest.wait("stands alone"))
        finally:
            guest.end(signal.SIGINT)

    def local():
        fresh()
        images.qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, disk)
        with machine(setup, of_file(disk, "qcow2"), time.monotonic()) as guest:
            return seen(guest, None)

    table = {
        "headwater boot": headwater,
        "qemu-storage-daemon, streaming": lambda: storage_daemon(True),
        "qemu-storage-daemon, not streaming": lambda: storage_daemon(False),
        "download, then boot": download,
        "local image": local,
    }
    return {name: table[name] for name in table if setup.wants(name)}, disk


def one_source(setup, source, latency, rate):
    """The table of one source."""
    filters = ["--filter=delay"] + (["--filter=rate"] if rate else [])
    values = [f"rdelay={latency}ms"] + ([f"rate={rate}", f"burstiness={BURST}"] if rate else [])
    found = {}
    with far_source.nbdkit(setup.folder, "--threads=64", *filters, "file", source, *values) as socket:
        uri = f"nbd+unix:///?socket={socket}"
        table, disk = programs(setup, source, uri, socket)
        links = []
        for turn in range(setup.repeat):
            since = time.monotonic()
            measure.run(["nbdcopy", "--requests=64", uri, "null:"], os.path.join(setup.folder, "link.log"))
            links.append(time.monotonic() - since)
            for name in list(table)[:: 1 if turn % 2 == 0 else -1]:
                measure.settle()
                # The far machine has its image in memory.
                with open(source, "rb") as file:
                    while file.read(16 << 20):
                        pass
                found.setdefault(name, []).append(table[name]())
                if turn == 0 and found[name][0].local and name != "local image":
                    images.compare(source, "raw", disk, "qcow2")
    middle = lambda values: sorted(values)[len(values) // 2]  # noqa: E731
    own = middle(links)
    rows = []
    for name, boots in found.items():
        seconds = [middle([getattr(boot, what) for boot in boots]) for what in ("user_space", "ready", "waited")]
        copied = [boot.local for boot in boots if boot.local is not None]
        times = [f"{middle(copied):.1f}", f"{middle(copied) / own:.2f}"] if copied else ["-", "-"]
        rows.append([name, *(f"{second:.1f}" for second in seconds), *times])
    title = f"(g) {os.stat(source).st_blocks * 512 // images.MIB} MiB of data, {latency} ms for each read"
    title += f", {rate // 1_000_000} Mbit/s" if rate else ", no limit"
    title += f" (nbdcopy to nowhere: {own:.1f} s)"
    return measure.table(title, ["way", "user space s", "ready s", "waited s", "all is local s", "of the link's time"], rows)


def run(setup):
    """The tables of part (g), as they come."""
    setup.machine = boot_image.machine.qemu()
    source = boot_image.make(setup.folder, setup.boot_size)
    for latency, rate in SOURCES:
        yield one_source(setup, source, latency, rate)
