"""Images: made, looked at and compared with QEMU's own tools, never through the daemon under test."""

import json
import os
import shutil
import subprocess

from drive.monitor import PATIENCE, Failed

MIB = 1 << 20


def tool(*words, script=None, status=0, folder=None):
    """Runs a tool to its end and gives its output. `status` None allows any exit status."""
    words = [str(word) for word in words]
    try:
        done = subprocess.run(
            words,
            input=script.encode() if script else None,
            stdin=None if script else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            check=False,
            cwd=folder,
        )
    except subprocess.TimeoutExpired as stuck:
        raise Failed(f"{' '.join(words)} took more than {PATIENCE} s: {(stuck.output or b'').decode(errors='replace')}") from None
    out = done.stdout.decode(errors="replace")
    if status is not None and done.returncode != status:
        raise Failed(f"{' '.join(words)} ended with {done.returncode}: {out}")
    return out


class Images:
    """The images of one scenario, in its folder."""

    def __init__(self, case):
        self._case = case

    def raw(self, name, size="4M", fill=None):
        """A raw image, all `fill` if that is given."""
        path = self._case.path(name)
        tool("qemu-img", "create", "-q", "-f", "raw", path, size)
        if fill is not None:
            self.write(path, f"write -P {fill} 0 {size}", form="raw")
        return path

    def qcow2(self, name, size="4M", backing=None, options=None, backing_format="qcow2", writes=()):
        """A qcow2 image, with a backing file (its name in the folder) if one is given."""
        path = self._case.path(name)
        words = ["-b", self._case.path(backing), "-F", backing_format] if backing else []
        tool("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), *words, path, *([size] if size else []))
        self.write(path, *writes)
        return path

    def write(self, path, *commands, form="qcow2"):
        """Runs qemu-io commands on an image that nobody has open."""
        if commands:
            out = tool("qemu-io", "-f", form, path, script="\n".join(commands) + "\n")
            if "failed" in out or "error" in out.lower():
                raise Failed(f"qemu-io on {path}: {out}")

    def chain(self, *names, size="4M", options=None):
        """A chain of qcow2 images, base first, whose data differ: each layer hides a part of those below it.

        Gives a `Chain`, which knows what the top must read as.
        """
        below = None
        for level, name in enumerate(names):
            writes = [f"write -P {level + 1} {level * 640}k 1M", f"write -P {100 + level} {3 * MIB + level * 65536} 64k"]
            self.qcow2(f"{name}.qcow2", size, f"{below}.qcow2" if below else None, options, writes=writes)
            below = name
        return Chain(self._case, list(names))

    def info(self, name, form="qcow2"):
        """What `qemu-img info` says of an image, without its backing chain."""
        return json.loads(tool("qemu-img", "info", "-U", "--output=json", "-f", form, self._case.path(name)))

    def backing(self, name):
        """The backing file and format that a qcow2 header names, as a pair; (None, None) for none."""
        info = self.info(name)
        return info.get("backing-filename"), info.get("backing-filename-format")

    def map(self, name, form="qcow2"):
        """Extents of an image and its chain."""
        extents = json.loads(tool("qemu-img", "map", "-U", "--output=json", "-f", form, self._case.path(name)))
        keys = ("start", "length", "depth", "present", "zero", "data")
        return [[extent.get(key) for key in keys] for extent in extents]

    def check(self, name, leaks=False):
        """Fails unless `qemu-img check` finds nothing wrong."""
        out = tool("qemu-img", "check", "-f", "qcow2", self._case.path(name), status=None)
        if "No errors were found" not in out and not (leaks and "ERROR" not in out):
            raise Failed(f"qemu-img check {name}: {out}")

    def copy(self, name, to, form="qcow2"):
        """What an image (through its chain) reads as, in a raw file."""
        tool("qemu-img", "convert", "-U", "-f", form, "-O", "raw", self._case.path(name), self._case.path(to))
        return self._case.path(to)

    def same(self, name, expected, form="qcow2", expected_form="raw", strict=False):
        """Fails unless two images read alike."""
        words = ["-s"] if strict else []
        tool("qemu-img", "compare", *words, "-f", form, "-F", expected_form, self._case.path(name), self._case.path(expected))

    def duplicate(self, name, to):
        """A copy of the file itself."""
        shutil.copyfile(self._case.path(name), self._case.path(to))
        return self._case.path(to)

    def size(self, name):
        """The length of a file."""
        return os.path.getsize(self._case.path(name))


class Chain:
    """A chain of images, base first."""

    def __init__(self, case, names):
        self._case = case
        self.names = names
        self.expected = case.images.copy(f"{names[-1]}.qcow2", f"{names[-1]}-expected.raw")

    def file(self, name):
        """The path of a layer's image."""
        return self._case.path(f"{name}.qcow2")

    def add(self, qmp, wrap=None, **top):
        """Adds the nodes one by one, base first, with the files as nodes of their own: `base`, `base-file` and so on.

        `wrap` maps a layer to a filter put above it, as a function of the node's name that gives options; `top` are options of the top node.
        """
        below = None
        for name in self.names:
            qmp.run("blockdev-add", driver="file", node_name=f"{name}-file", filename=self.file(name))
            options = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": below}
            if name == self.names[-1]:
                options.update({key.replace("_", "-"): value for key, value in top.items()})
            qmp.run("blockdev-add", **options)
            below = name
            if wrap and name in wrap:
                above = wrap[name](name)
                qmp.run("blockdev-add", **above)
                below = above["node-name"]

    def reads_as_before(self, name=None):
        """Fails unless the top reads as it did, and its image is sound."""
        name = name or self.names[-1]
        self._case.images.same(f"{name}.qcow2", self.expected)
        self._case.images.check(f"{name}.qcow2")

    def guest_wrote(self, *commands):
        """Applies writes to what the top is expected to read as."""
        self._case.images.write(self.expected, *commands, form="raw")
