"""What a scenario is and what it gets: a folder, daemons, images, a transcript."""

import asyncio
import json
import os
import re
import signal
import subprocess
import time

from drive import images
from drive.monitor import PATIENCE, Failed, Monitor, RawMonitor
from drive.transcript import Transcript

SCENARIOS = {}

# Ends of a process that no test causes.
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL)

# How a daemon names itself in what it prints.
OWN_NAME = re.compile(r"^(?:\S*/)?(?:qemu-storage-daemon|headwater-storage-daemon|headwater daemon|headwater)(?=:|\s)", re.MULTILINE)


def scenario(function=None, *, parallel=False):
    """Registers a scenario under `<file>.<function>`.

    `parallel`: jobs run at the same time in it, so that the events of each are compared apart.
    """

    def register(function):
        function.parallel = parallel
        SCENARIOS[f"{function.__module__.rsplit('.', 1)[-1]}.{function.__name__}"] = function
        return function

    return register(function) if function else register


def check(condition, text):
    """What must hold of any correct daemon."""
    if not condition:
        raise Failed(text)


class Case:
    """One run of one scenario against one program. `patient`: with the known races of the reference at its start."""

    def __init__(self, program, folder, patient=False):
        self.program = program
        self.patient = patient
        self.folder = folder
        self.loop = asyncio.new_event_loop()
        # qemu.qmp leaves the end of a connection as an exception that nobody asks for.
        self.loop.set_exception_handler(lambda *_: None)
        self.transcript = Transcript()
        self.transcript.hide(folder, "<dir>")
        self.images = images.Images(self)
        self.children = []
        self._daemons = []
        self._closers = []

    def path(self, name):
        """A path in the folder of this run."""
        return os.path.join(self.folder, name)

    def note(self, label, value):
        """Something to compare that isn't a message of a monitor."""
        self.transcript.add("notes", label, value)

    def daemon(self, *options, monitors=1, **popen):
        """Starts a daemon with a monitor on a socket, and waits until it answers. Gives the `Daemon`, its monitor is `.qmp`."""
        daemon = Daemon(self, len(self._daemons), options, monitors, popen)
        self._daemons.append(daemon)
        return daemon

    def spawn(self, words, **popen):
        """A child process that is ended with the scenario."""
        child = subprocess.Popen(words, cwd=self.folder, **popen)
        self.children.append(child)
        return child

    def launch(self, *options, **popen):
        """The daemon's program as a plain child, for what happens before there is a monitor."""
        return self.spawn([*self.program, *map(str, options)], **popen)

    def outcome(self, label, *options, text=True, stdin=subprocess.DEVNULL):
        """Runs the program to its end and compares exit status and what it printed on stderr; gives both and stdout."""
        child = self.launch(*options, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = child.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise Failed(f"{label}: {' '.join(map(str, options))} neither failed nor ended within {PATIENCE} s") from None
        err = own_name(err.decode(errors="replace"))
        self.note(label, {"status": child.returncode, **({"stderr": err} if text else {})})
        return child.returncode, out.decode(errors="replace"), err

    def defer(self, function):
        """Calls `function` when the scenario is over."""
        self._closers.append(function)

    def loop_device(self, path, read_only=False):
        """A loop device over a file, or None where there is none to be had."""
        words = ["losetup", "--find", "--show", *(["--read-only"] if read_only else []), path]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        if done.returncode:
            return None
        device = done.stdout.decode().strip()
        self.defer(lambda: subprocess.run(["losetup", "--detach", device], check=False, stderr=subprocess.DEVNULL))
        self.transcript.hide(device, "<loop>")
        return device

    def finish(self):
        """Ends daemons in order, recording what they still say."""
        for daemon in self._daemons:
            daemon.quit()

    def crashed(self):
        """Whether a child was ended by a signal that nobody here sent."""
        return any(child.poll() in CRASHES for child in self.children)

    def abandon(self):
        """Ends whatever still runs."""
        for child in self.children:
            if child.poll() is None:
                child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream:
                    stream.close()
        for function in reversed(self._closers):
            function()
        # Connections that were left open are cut: their tasks must not outlive the loop.
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE))
        self.loop.close()


class Daemon:
    """A running daemon."""

    def __init__(self, case, number, options, monitors, popen):
        self.case = case
        self._pidfile = case.path(f"daemon{number}.pid")
        self._log = case.path(f"daemon{number}.log")
        self.sockets = [case.path(f"d{number}m{index}.sock") for index in range(monitors)]
        words = [str(option) if not isinstance(option, dict) else json.dumps(option) for option in options]
        for index, path in enumerate(self.sockets):
            words += ["--chardev", f"socket,id=monitor{index},path={path},server=on,wait=off", "--monitor", f"chardev=monitor{index}"]
        words += ["--pidfile", self._pidfile]
        with open(self._log, "wb") as log:
            popen = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **popen}
            self.child = case.launch(*words, **popen)
        self.pid = self.child.pid
        self._await_start()
        self.monitors = [Monitor(case, path, f"d{number}m{index}", self) for index, path in enumerate(self.sockets)]
        self.qmp = self.monitors[0] if self.monitors else None

    def _await_start(self):
        deadline = time.monotonic() + PATIENCE
        # The pid file is there when all is set up. Who comes to the socket before the monitor is there may confuse the reference.
        while not (os.path.exists(self._pidfile) and os.path.getsize(self._pidfile)):
            if self.child.poll() is not None:
                raise Failed(f"the daemon ended with {self.child.returncode} at its start: {self.log()}")
            if time.monotonic() > deadline:
                raise Failed("the daemon wrote no pid file")
            time.sleep(0.005)

    def log(self):
        """What it printed so far."""
        with open(self._log, encoding="utf-8", errors="replace") as log:
            return own_name(log.read())

    def raw(self, name, greet=True, monitor=0):
        """Another connection to a monitor's socket, in bytes. The socket must be free: close its `Monitor` before."""
        return RawMonitor(self.case, self.sockets[monitor], name, greet)

    def ended(self):
        """Waits until the process is gone and gives its exit status."""
        try:
            return self.child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"the daemon didn't end within {PATIENCE} s") from None

    def signal(self, number):
        """Sends a signal and waits for the end."""
        self.child.send_signal(number)
        return self.ended()

    def quit(self):
        """Ends the daemon with `quit`, records the rest and checks that it went well."""
        if self.child.poll() is None:
            if self.qmp is None or not self.qmp.connected():
                self.child.send_signal(signal.SIGTERM)
            else:
                self.qmp.run("quit")
                for monitor in self.monitors[1:]:
                    monitor.drain()
            check(self.ended() == 0, f"the daemon ended with {self.child.returncode}: {self.log()}")
        elif self.child.returncode > 0 or self.child.returncode in CRASHES:
            raise Failed(f"the daemon ended with {self.child.returncode}: {self.log()}")


def own_name(text):
    """A text without the name of the program that wrote it."""
    return OWN_NAME.sub("<program>", text)
