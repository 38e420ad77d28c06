"""qemu-storage-daemon, driven over QMP on its standard input and output."""

import json
import subprocess
import time

import measure


def protocol_node(name, path, direct=True):
    """A file node with the options that make it fastest here."""
    return {
        "driver": "file",
        "node-name": name,
        "filename": path,
        "aio": "io_uring" if direct else "threads",
        "cache": {"direct": direct},
    }


class StorageDaemon:
    """One qemu-storage-daemon. `cost` is known once `quit` has returned."""

    def __init__(self, log):
        self.cost = None
        self._events = []
        self._log = open(log, "wb")
        self._since = time.monotonic()
        self.child = subprocess.Popen(
            ["qemu-storage-daemon", "--chardev", "stdio,id=qmp", "--monitor", "qmp"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._read()
        self.command("qmp_capabilities")

    def _read(self):
        line = self.child.stdout.readline()
        if not line:
            raise measure.Failed(f"qemu-storage-daemon closed QMP, see {self._log.name}")
        return json.loads(line)

    def command(self, name, /, **arguments):
        """One command and its answer; events in between are kept for `wait_for`."""
        request = {"execute": name, "arguments": arguments}
        self.child.stdin.write(json.dumps(request).encode() + b"\n")
        self.child.stdin.flush()
        while True:
            message = self._read()
            if "error" in message:
                raise measure.Failed(f"{name}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self._events.append(message)

    def add(self, **options):
        """Adds a node; `_` in names stands for `-`."""
        self.command("blockdev-add", **{name.replace("_", "-"): value for name, value in options.items()})

    def wait_for(self, event):
        """Waits for an event and returns its data."""
        while True:
            message = self._events.pop(0) if self._events else self._read()
            if message.get("event") == event:
                return message["data"]

    def quit(self):
        """Ends the daemon."""
        if self.child.returncode is None:
            self.command("quit")
            self.child.stdin.close()
            _, self.cost = measure.reap(self.child, self._since)
            self.child.stdout.close()
            self._log.close()
        return self.cost


def block_stream(source, overlay, log):
    """Streams `source` (options of a node) into the qcow2 file `overlay`. Wall time is the job's own."""
    daemon = StorageDaemon(log)
    try:
        daemon.add(**{**source, "node-name": "source"})
        daemon.add(**protocol_node("overlay-file", overlay))
        daemon.add(driver="qcow2", node_name="overlay", file="overlay-file", backing="source", discard="unmap")
        since = time.monotonic()
        daemon.command("block-stream", **{"job-id": "stream", "device": "overlay"})
        done = daemon.wait_for("BLOCK_JOB_COMPLETED")
        wall = time.monotonic() - since
        if "error" in done:
            raise measure.Failed(f"block-stream: {done['error']}")
    finally:
        cost = daemon.quit()
    cost.wall = wall
    return cost
