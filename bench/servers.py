"""headwater and qemu-storage-daemon as servers of one image, in the same words."""

import contextlib
import json
import os
import subprocess
from dataclasses import dataclass

import far_source
import qemu


@dataclass
class Export:
    """How an image is served."""

    kind: str = "nbd"  # or "vhost-user-blk"
    direct: bool = True  # past the page cache, or through it
    writable: bool = False


def address(setup, export):
    """The socket, which is not there yet."""
    path = os.path.join(setup.folder, f"serve-{export.kind}.sock")
    if os.path.exists(path):
        os.unlink(path)
    return path


@contextlib.contextmanager
def headwater(setup, image, form, export):
    """`headwater serve` on a socket; gives its process id and the socket."""
    path = address(setup, export)
    uri = f"nbd+unix:///disk?socket={path}" if export.kind == "nbd" else f"vhost-user-blk:{path}"
    words = [setup.headwater, "serve", image, "--format", form, "--serve", uri]
    words += ["--cache", "direct" if export.direct else "buffered"]
    words += [] if export.writable else ["--read-only"]

    def ready(child):
        far_source.wait_for_socket(path)
        return child.pid

    with open(os.path.join(setup.folder, "serve.log"), "wb") as out, far_source.serving(words, ready, stderr=out) as pid:
        yield pid, path


@contextlib.contextmanager
def storage_daemon(setup, image, form, export):
    """qemu-storage-daemon with an export; gives its process id and the socket."""
    path = address(setup, export)
    daemon = qemu.StorageDaemon(os.path.join(setup.folder, "serve.log"))
    try:
        daemon.add(**nodes(image, form, export))
        words = {"type": export.kind, "id": "e", "node-name": "node-0", "writable": export.writable}
        if export.kind == "nbd":
            daemon.command("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
            words["name"] = "disk"
        else:
            words["addr"] = {"type": "unix", "path": path}
        daemon.command("block-export-add", **words)
        yield daemon.child.pid, path
    finally:
        daemon.quit()


def nodes(image, form, export):
    """The nodes of an image and its whole chain; `node-0` is the top, and alone may be written to."""
    out = subprocess.run(["qemu-img", "info", "--backing-chain", "--output=json", "-f", form, image], check=True, stdout=subprocess.PIPE)
    below = None
    layers = json.loads(out.stdout)
    for depth, layer in reversed(list(enumerate(layers))):
        options = {"driver": layer["format"], "node-name": f"node-{depth}"}
        options["read-only"] = depth > 0 or not export.writable
        options["file"] = qemu.protocol_node(f"file-{depth}", layer["filename"], export.direct)
        if layer["format"] == "qcow2":
            options["backing"] = below
        below = options
    return below
