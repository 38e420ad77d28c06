"""The guest's disk, seen from the host: an ext4 file system and blocks of data behind it, made and looked into without mounting anything."""

import hashlib
import random
import subprocess

from machine import check, run


def content(file, round_):
    """What a file holds after a round; init knows the same."""
    length = (file * 7919 + round_ * 104729) % 300000 + 1
    line = f"file {file} of round {round_}\n".encode()
    return (line * (length // len(line) + 1))[:length]


MIB = 1 << 20
# In MiB: the file system, and what is behind it, which no file system changes by itself.
SYSTEM, TAIL = 256, 96
SIZE = (SYSTEM + TAIL) * MIB


def make(path):
    """A file system with one file, and the tail, in a raw image."""
    with open(path, "wb") as image:
        image.truncate(SIZE)
        image.seek(SYSTEM * MIB)
        image.writelines(tail())
    inside = path.parent / "inside"
    inside.mkdir()
    (inside / "host").write_bytes(content(1, 0))
    run("mkfs.ext4", "-q", "-F", "-d", inside, path, f"{SYSTEM}M")


def tail():
    """The tail as the guest finds it, in pieces of 1 MiB."""
    return [random.Random(piece).randbytes(MIB) for piece in range(TAIL)]


def tail_sum():
    """What the guest is to find there."""
    return hashlib.md5(b"".join(tail())).hexdigest()


def used_tail():
    """The tail as a guest leaves it that was told `work=use`; init knows the same."""
    pieces = tail()
    pieces[5] = content(5, 5).ljust(MIB, b"\0")
    for piece in (*range(8, 24), TAIL - 1):
        pieces[piece] = bytes(MIB)
    return pieces


class Contents:
    """What is on a disk that nobody uses."""

    def __init__(self, image, directory, crashed=False):
        checked = subprocess.run(["qemu-img", "check", image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # A kill may leave clusters that nobody refers to (3), which is no harm; anything else is.
        check(checked.returncode in ((0, 3) if crashed else (0,)), f"qemu-img check: {checked.stdout}")
        self._raw = directory / "contents.raw"
        run("qemu-img", "convert", "-O", "raw", image, self._raw)
        # One that was in use has its journal replayed first, as it would be when it is mounted.
        done = subprocess.run(["e2fsck", "-fy" if crashed else "-fn", self._raw], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        check(done.returncode in ((0, 1) if crashed else (0,)), f"e2fsck: {done.stdout}")
        self._directory = directory

    def check_use(self, files):
        """All that is there is what a guest leaves that was told `work=use`."""
        listed = run("debugfs", "-R", "ls -p /", self._raw).splitlines()
        names = {line.split("/")[5] for line in listed if line.startswith("/")} - {".", "..", "lost+found"}
        check(names == {"host", *(f"f{file}" for file in range(1, files + 1))}, f"there are {sorted(names)}")
        check(self.file("host") == content(1, 0), "what the host wrote")
        for file in range(1, files + 1):
            self.check(file, 2)
        check(self._raw.stat().st_size == SIZE, "the disk's size")
        with open(self._raw, "rb") as image:
            image.seek(SYSTEM * MIB)
            for number, piece in enumerate(used_tail()):
                check(image.read(MIB) == piece, f"MiB {number} behind the file system")

    def file(self, name):
        """A file's bytes."""
        out = self._directory / "dumped"
        out.unlink(missing_ok=True)
        run("debugfs", "-R", f"dump /{name} {out}", self._raw)
        check(out.exists(), f"there is no {name}")
        return out.read_bytes()

    def check(self, file, round_):
        """A file holds what this round wrote."""
        found = self.file(f"f{file}")
        check(found == content(file, round_), f"file {file} isn't that of round {round_}: {found[:40]}... of {len(found)} bytes")
