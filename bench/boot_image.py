"""A disk that a machine's firmware boots: syslinux on FAT, a root file system behind it, both of Debian's packages, made without mounting and without root."""

import pathlib
import random
import shutil
import subprocess
import sys

import images

TREE = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE / "tests" / "guest"))

import machine  # noqa: E402

TOOLS = TREE / "target" / "tools" / "syslinux"
# Where the partitions begin, in MiB.
BOOT, ROOT = 1, 64
# How many files the guest reads before it is ready, and how large they are.
NEEDED, NEEDED_SIZE = 40, images.MIB

# In memory: finds the root file system and goes there.
FIRST = """#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev 2>/dev/null
while read -r module; do insmod "/modules/$module"; done </modules/order
while [ ! -b /dev/vda2 ]; do usleep 10000; done
mount -t ext4 -o ro /dev/vda2 /mnt || poweroff -f
exec switch_root /mnt /sbin/init
"""

# On the disk: says that it is there, reads what services would, and stays.
SECOND = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
echo "guest: user space" >/dev/console
/bin/busybox cat /srv/needed* >/dev/null
echo "guest: ready" >/dev/console
while true; do /bin/busybox sleep 1000; done
"""

CONFIG = """DEFAULT linux
PROMPT 0
LABEL linux
  KERNEL vmlinuz
  INITRD initrd
  APPEND console=ttyS0 quiet panic=-1
"""


def run(*words, **options):
    """Runs a tool, quietly."""
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)


def tools():
    """The folder with syslinux and mtools, fetched when they aren't there."""
    root = TOOLS / "root"
    if not root.exists():
        TOOLS.mkdir(parents=True, exist_ok=True)
        run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "syslinux", "syslinux-common", "mtools", cwd=TOOLS)
        for package in TOOLS.glob("*.deb"):
            run("dpkg", "-x", package, TOOLS / "unpacked")
        (TOOLS / "unpacked").rename(root)
    return root


def memory_disk():
    """Kernel, and what runs before the root file system is there."""
    kernel, archive = machine.boot_files(FIRST.encode())
    return kernel, archive


def files(folder, size, kernel_root):
    """The root file system's files: a program, an init, what it reads, and much that lies between."""
    for name in ("bin", "sbin", "dev", "proc", "srv", "usr"):
        (folder / name).mkdir(parents=True)
    shutil.copy(kernel_root / "bin" / "busybox", folder / "bin" / "busybox")
    init = folder / "sbin" / "init"
    init.write_text(SECOND)
    init.chmod(0o755)
    source = random.Random(size)
    between = (size - NEEDED * NEEDED_SIZE) // NEEDED
    for number in range(NEEDED):
        for name, length in ((f"needed{number:02}", NEEDED_SIZE), (f"between{number:02}", between)):
            with open(folder / "srv" / name, "wb") as file:
                for at in range(0, length, images.MIB):
                    file.write(source.randbytes(min(images.MIB, length - at)))


def partitions(path, size):
    """The first sector: the loader's code and the table."""
    code = (tools() / "usr/lib/syslinux/mbr/mbr.bin").read_bytes().ljust(446, b"\0")
    table = bytearray()
    for active, kind, first, end in ((0x80, 0x0C, BOOT, ROOT), (0, 0x83, ROOT, size // images.MIB)):
        table += bytes([active, 0xFE, 0xFF, 0xFF, kind, 0xFE, 0xFF, 0xFF])
        table += (first * 2048).to_bytes(4, "little") + ((end - first) * 2048).to_bytes(4, "little")
    with open(path, "r+b") as disk:
        disk.write(code + table.ljust(64, b"\0") + b"\x55\xaa")


def make(folder, data):
    """The image with about so many bytes of data, made once; gives its path."""
    path = pathlib.Path(folder) / f"boot-{data}.raw"
    if path.exists():
        return str(path)
    size = (data * 9 // 8) // images.MIB * images.MIB + ROOT * images.MIB
    part, inside, staged = path.with_suffix(".part"), path.with_suffix(".inside"), path.with_suffix(".fat")
    shutil.rmtree(inside, ignore_errors=True)
    kernel, archive = memory_disk()
    files(inside, data, machine.packages())
    with open(part, "wb") as disk:
        disk.truncate(size)
    with open(staged, "wb") as disk:
        disk.truncate((ROOT - BOOT) * images.MIB)
    binaries = tools() / "usr" / "bin"
    environment = {"PATH": f"{binaries}:/usr/sbin:/usr/bin:/sbin:/bin", "MTOOLS_SKIP_CHECK": "1"}
    config = pathlib.Path(folder) / "syslinux.cfg"
    config.write_text(CONFIG)
    run("mformat", "-i", staged, "-F", "-T", (ROOT - BOOT) * 2048, "-h", 255, "-s", 63, "-H", BOOT * 2048, "::", env=environment)
    for name, source in (("vmlinuz", kernel), ("initrd", archive), ("syslinux.cfg", config)):
        run("mcopy", "-i", staged, source, f"::{name}", env=environment)
    run("syslinux", "--install", staged, env=environment)
    partitions(part, size)
    run("dd", f"if={staged}", f"of={part}", "bs=1M", f"seek={BOOT}", "conv=notrunc,sparse")
    run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-d", inside, "-E", f"offset={ROOT * images.MIB}", part, f"{size // images.MIB - ROOT}M")
    shutil.rmtree(inside)
    staged.unlink()
    part.rename(path)
    return str(path)
