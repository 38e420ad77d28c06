"""The guest's disk, seen from the host: an ext4 file system in a qcow2 image, made and looked into without mounting it."""

import subprocess

from machine import check, run


def content(file, round_):
    """What a file holds after a round; init knows the same."""
    length = (file * 7919 + round_ * 104729) % 300000 + 1
    line = f"file {file} of round {round_}\n".encode()
    return (line * (length // len(line) + 1))[:length]


def make(path, size="256M"):
    """A file system with one file, in a raw image."""
    run("truncate", "-s", size, path)
    inside = path.parent / "inside"
    inside.mkdir()
    (inside / "host").write_bytes(content(1, 0))
    run("mkfs.ext4", "-q", "-F", "-d", inside, path)


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
