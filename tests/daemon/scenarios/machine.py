"""A virtual machine that has an export as its disk."""

import json
import pathlib
import subprocess

from drive import check, nbd, scenario
from drive.jobs import SLOW, export, finish, idle

QEMU_SYSTEM = pathlib.Path(__file__).parents[3] / "scripts" / "qemu-system"


class Machine:
    """A machine without a guest: its disk is used through the monitor's qemu-io command."""

    def __init__(self, case, socket, name):
        program = subprocess.run([QEMU_SYSTEM], check=True, capture_output=True, text=True).stdout.strip()
        words = ["-nodefaults", "-display", "none", "-machine", "none", "-qmp", "stdio"]
        node = {"driver": "nbd", "node-name": "far", "server": {"type": "unix", "path": socket}, "export": name, "discard": "unmap", "reconnect-delay": 1}
        self._printed = ""
        self.child = case.spawn([program, *words, "-blockdev", json.dumps(node)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        check("QMP" in self._line(), "no greeting from qemu-system")
        self._ask("qmp_capabilities")

    def _line(self):
        # What its qemu-io command prints stands between the messages.
        while not (line := self.child.stdout.readline()).startswith(b"{"):
            check(line, "qemu-system ended")
            self._printed += line.decode()
        return json.loads(line)

    def _ask(self, command, **arguments):
        self.child.stdin.write(json.dumps({"execute": command, "arguments": arguments}).encode())
        self.child.stdin.flush()
        while True:
            answer = self._line()
            if "event" not in answer:
                return answer

    def do(self, command):
        """A qemu-io command on the disk; it must work."""
        out = self._ask("human-monitor-command", **{"command-line": f'qemu-io far "{command}"'})
        text, self._printed = self._printed + out.get("return", str(out)), ""
        check("error" not in text.lower() and "failed" not in text, f"qemu-system: {command}: {text}")

    def quit(self):
        """Ends it in order."""
        self._ask("quit")
        self.child.wait(20)


@scenario
def disk_of_a_machine(case):
    """The machine reads and writes while its disk is streamed."""
    case.transcript.mask("offset", "current-progress", "busy")
    chain = case.images.chain("base", "top")
    qmp = case.daemon().qmp
    chain.add(qmp, discard="unmap")
    address = export(case, qmp, "top", "disk")
    machine = Machine(case, case.path("nbd.sock"), "disk")
    machine.do("read -P 1 0 64k")
    qmp.run("block-stream", job_id="job", device="top", speed=SLOW)
    idle(qmp)
    writes = ["write -P 21 1M 64k", "write -z 2M 64k", "write -P 22 3500k 100k"]
    for write in writes:
        machine.do(write)
    chain.guest_wrote(*writes)
    qmp.run("block-job-set-speed", device="job", speed=0)
    finish(qmp)
    machine.do("read -P 21 1M 64k")
    machine.do("flush")
    machine.quit()
    nbd.io(address, "read -P 22 3500k 100k")
    qmp.run("quit")
    chain.reads_as_before()
