"""NBD clients: QEMU's tools and libnbd, never our own."""

import json
import os
import subprocess
import urllib.parse

from drive.images import tool
from drive.monitor import PATIENCE, Failed


def uri(socket, export=""):
    """The address of an export behind a Unix socket, or behind a (host, port)."""
    if isinstance(socket, tuple):
        return f"nbd://{socket[0]}:{socket[1]}/{urllib.parse.quote(export)}"
    return f"nbd+unix:///{urllib.parse.quote(export)}?socket={socket}"


def io(address, *commands, read_only=False, options=()):
    """Runs qemu-io commands against an export; gives the output. Fails if one of them does."""
    out = tool("qemu-io", "-f", "raw", *options, *(["-r"] if read_only else []), address, script="\n".join(commands) + "\n")
    if "failed" in out or "error" in out.lower():
        raise Failed(f"qemu-io {address} {commands}: {out}")
    return out


def io_fails(address, *commands, read_only=False):
    """The same where it must fail; gives the output without the address."""
    out = tool("qemu-io", "-f", "raw", *(["-r"] if read_only else []), address, script="\n".join(commands) + "\n", status=None)
    if "failed" not in out and "error" not in out.lower() and "can't open" not in out:
        raise Failed(f"qemu-io {address} {commands} should fail: {out}")
    return out


def reachable(address):
    """Whether a client gets at an export."""
    done = subprocess.run(["nbdinfo", "--size", address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=PATIENCE, check=False)
    return done.returncode == 0


def listing(address):
    """What a server says about its exports, without what is the tool's own."""
    found = json.loads(tool("nbdinfo", "--list", "--json", address))
    keep = ("export-name", "description", "export-size", "is_read_only", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero")
    keep += ("can_cache", "can_df", "can_multi_conn", "is_rotational", "contexts", "block_size_minimum", "block_size_preferred", "block_size_maximum")
    exports = [{key: export.get(key) for key in keep} for export in found["exports"]]
    return {"protocol": found["protocol"], "structured": found["structured"], "exports": sorted(exports, key=lambda export: export["export-name"])}


def shell(address, script, *words):
    """Runs a Python script with libnbd, connected as `h`; gives its output. The module belongs to the system's Python."""
    return tool("/usr/bin/python3", "-m", "nbd", "--uri", address, *words, "--command", script)


class Client:
    """A qemu-io that stays connected and does one command after the other."""

    def __init__(self, case, address, *words, form="raw"):
        env = {**os.environ, "LC_ALL": "C"}
        self.child = case.spawn(
            ["qemu-io", "-f", form, *words, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
        )
        self._until_prompt()

    def _until_prompt(self):
        """The output up to the next prompt."""
        seen = b""
        while not seen.endswith(b"qemu-io> "):
            byte = self.child.stdout.read(1)
            if not byte:
                raise Failed(f"qemu-io ended: {seen.decode(errors='replace')}")
            seen += byte
        return seen[: -len(b"qemu-io> ")].decode(errors="replace")

    def start(self, command):
        """Gives a command without waiting for its end."""
        self.child.stdin.write(command.encode() + b"\n")
        self.child.stdin.flush()

    def result(self):
        """The output of what `start` gave."""
        return self._until_prompt()

    def do(self, command):
        """A command and its output; it must work."""
        self.start(command)
        out = self.result()
        if "failed" in out or "error" in out.lower():
            raise Failed(f"qemu-io {command}: {out}")
        return out

    def fails(self, command):
        """A command that must fail; gives the output."""
        self.start(command)
        out = self.result()
        if "failed" not in out and "error" not in out.lower():
            raise Failed(f"qemu-io {command} should fail: {out}")
        return out

    def close(self):
        """Disconnects in order."""
        self.child.stdin.close()
        self.child.stdout.read()
        self.child.wait(PATIENCE)
