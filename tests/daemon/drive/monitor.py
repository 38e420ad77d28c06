"""QMP clients: `Monitor` on top of the package qemu.qmp, `RawMonitor` for what a decent client never sends."""

import asyncio
import json
import socket
import time

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate, StateError

# Seconds that anything may take before it counts as hung. Generous: both daemons and other tests share two cores.
PATIENCE = 20


class Failed(Exception):
    """A daemon did what no correct daemon does."""


def names(arguments):
    """Python's names as QMP's: `_` stands for `-`, and a trailing one keeps a keyword apart."""
    return {name.rstrip("_").replace("_", "-"): value for name, value in arguments.items()}


class Recorder(QMPClient):
    """A QMP client that shows each message to a listener in the order of arrival."""

    def __init__(self, name, listener):
        super().__init__(name)
        self._listener = listener
        self._issued = {}

    def _cb_outbound(self, msg):
        if "id" in msg and "execute" in msg:
            self._issued[msg["id"]] = msg["execute"]
        return super()._cb_outbound(msg)

    def _cb_inbound(self, msg):
        msg = super()._cb_inbound(msg)
        if "QMP" in msg:
            # This client would turn on out-of-band execution, which only the reference has.
            msg["QMP"] = {**msg["QMP"], "capabilities": []}
        self._listener(self._issued.get(msg.get("id")), json.loads(bytes(msg)))
        return msg


class Monitor:
    """A QMP connection used from ordinary code. What arrives goes into the transcript and into `events`.

    Only while one of its methods runs does anything arrive; nothing is lost in between.
    """

    def __init__(self, case, path, name, daemon=None):
        self.name = name
        self._case = case
        self._daemon = daemon
        self._loop = case.loop
        self._news = asyncio.Event()
        self._counts = {}
        self._taken = set()
        self.events = []
        self._client = self._connect(path)

    def _connect(self, path):
        """A connected client. The reference may greet twice who comes early, which confuses the client: then it tries again."""
        for again in range(3):
            client = Recorder(self.name, self._arrived)
            try:
                self._complete(client.connect(path))
                return client
            except ConnectError as error:
                if not self._case.patient or again == 2:
                    raise Failed(f"cannot connect to {path}: {error}") from None
        raise AssertionError

    def _complete(self, future, patience=PATIENCE):
        async def bounded():
            return await asyncio.wait_for(future, patience)

        return self._loop.run_until_complete(bounded())

    def _arrived(self, command, message):
        if "event" in message:
            message.pop("timestamp", None)
            self.events.append(message)
            self._case.transcript.add(self.name, "event " + message["event"], message)
            self._news.set()
        elif command and command != "qmp_capabilities":
            message.pop("id", None)
            count = self._counts[command] = self._counts.get(command, 0) + 1
            self._case.transcript.add(self.name, f"{command} #{count}", message)

    def start(self, command, **arguments):
        """Sends a command without waiting for its reply: pass what it gives to `reply`."""
        task = self._loop.create_task(self._client.execute(command, names(arguments) or None))
        self._loop.run_until_complete(asyncio.sleep(0))
        return task

    def reply(self, task):
        """The reply to what `start` sent; an error is an ExecuteError."""
        return self._complete(task)

    def _execute(self, command, arguments):
        """The reply to a command as a pair: what it returned, and the description of its error."""
        told = f"{command} {json.dumps(names(arguments))}"
        try:
            return self._complete(self._client.execute(command, names(arguments) or None)), None
        except ExecuteError as error:
            return None, str(error)
        except asyncio.TimeoutError:
            raise Failed(f"{told}: no reply for {PATIENCE} s") from None
        except (ExecInterruptedError, StateError):
            raise Failed(f"{told}: the daemon closed the connection") from None

    def run(self, command, /, **arguments):
        """A command that must work; gives what it returns. After `quit` the daemon is gone, and its last words are recorded."""
        answer, error = self._execute(command, arguments)
        if error is not None:
            raise Failed(f"{command} {json.dumps(names(arguments))}: {error}")
        if command == "quit":
            self.drain()
            if self._daemon:
                self._daemon.ended()
        return answer

    def refuse(self, command, /, **arguments):
        """A command that must be refused; gives the description."""
        answer, error = self._execute(command, arguments)
        if error is None:
            raise Failed(f"{command} {json.dumps(names(arguments))} should be refused, returned {answer}")
        return error

    def attempt(self, command, /, **arguments):
        """A command that may work or not: whether it did. What the daemon says is compared all the same."""
        return self._execute(command, arguments)[1] is None

    def wait(self, event, /, **data):
        """Waits for the next event of this kind with these data, and gives its data.

        Each event is given once, and with it go earlier ones of its kind about the same job.
        """

        async def next_one():
            while True:
                for at, message in enumerate(self.events):
                    if at not in self._taken and message["event"] == event and matches(message, names(data)):
                        self._take(at)
                        return message.get("data", {})
                self._news.clear()
                if self._client.runstate != Runstate.RUNNING:
                    raise Failed(f"the daemon closed the monitor while {event} {data} was awaited")
                await asyncio.wait([asyncio.ensure_future(self._news.wait())], timeout=0.2)

        try:
            return self._complete(next_one())
        except asyncio.TimeoutError:
            raise Failed(f"no {event} {data} within {PATIENCE} s; seen: {summary(self.events)}") from None

    def _take(self, found):
        identity = self.events[found].get("data", {})
        for at, message in enumerate(self.events[: found + 1]):
            data = message.get("data", {})
            if message["event"] == self.events[found]["event"] and all(data.get(k) == identity.get(k) for k in ("id", "device")):
                self._taken.add(at)

    def wait_status(self, job, status):
        """Waits until a job says that it is in a state."""
        return self.wait("JOB_STATUS_CHANGE", id=job, status=status)

    def seen(self, event, **data):
        """The data of such events so far."""
        return [e.get("data", {}) for e in self.events if e["event"] == event and matches(e, names(data))]

    def poll(self, condition, what):
        """Asks again and again until `condition()` holds: for what no event tells."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f"not within {PATIENCE} s: {what}")
            self._loop.run_until_complete(asyncio.sleep(0.02))

    def quiet(self, command, /, **arguments):
        """A command that leaves no trace in the transcript, as its answer or number depends on timing."""
        before = self._counts.get(command, 0)
        entries = self._case.transcript.streams.setdefault(self.name, [])
        try:
            return self.run(command, **arguments)
        finally:
            self._counts[command] = before
            label = f"{command} #{before + 1}"
            entries[:] = [entry for entry in entries if entry[0] != label]

    def job(self, name):
        """What query-jobs says about a job, without trace; None if it is gone."""
        return next((job for job in self.quiet("query-jobs") if job["id"] == name), None)

    def block_job(self, name):
        """What query-block-jobs says about a job, without trace; None if it is gone."""
        return next((job for job in self.quiet("query-block-jobs") if job["device"] == name), None)

    def connected(self):
        """Whether the connection stands, as far as is known."""
        return self._client.runstate == Runstate.RUNNING

    def drain(self):
        """Reads until the daemon closes the connection."""

        async def to_the_end():
            while self._client.runstate == Runstate.RUNNING:
                await self._client.runstate_changed()
            await self._client.disconnect()

        try:
            self._complete(to_the_end())
        except (QMPError, EOFError, OSError):
            pass

    def close(self):
        """Hangs up."""
        try:
            self._complete(self._client.disconnect())
        except (QMPError, EOFError, OSError):
            pass


def matches(message, wanted):
    """Whether an event has these data."""
    data = message.get("data", {})
    return all(data.get(key) == value for key, value in wanted.items())


def summary(events):
    """Events in one line, for a failure."""
    told = [f"{e['event']}{list(e.get('data', {}).values())}" for e in events[-12:]]
    return ", ".join(told) or "none"


class RawMonitor:
    """A QMP connection in bytes."""

    def __init__(self, case, address, name, greet=True):
        self.name = name
        self._case = case
        self.socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(address)
        self._adopt(greet)

    @classmethod
    def adopt(cls, case, connected, name, greet=True):
        """A connection that was accepted rather than made."""
        self = cls.__new__(cls)
        self.name, self._case, self.socket = name, case, connected
        connected.settimeout(PATIENCE)
        self._adopt(greet)
        return self

    def _adopt(self, greet):
        self._buffer = b""
        self._counts = {}
        if greet:
            self.read("greeting")

    def send(self, data):
        """Sends a message (anything that JSON has) or bytes as they are."""
        self.socket.sendall(data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n")

    def line(self):
        """The next line, or None at the end."""
        while b"\n" not in self._buffer:
            try:
                more = self.socket.recv(1 << 16)
            except TimeoutError:
                raise Failed(f"{self.name}: nothing to read for {PATIENCE} s") from None
            except ConnectionResetError:
                more = b""
            if not more:
                return None
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def read(self, label="message", record=True):
        """The next message, also put into the transcript."""
        line = self.line()
        message = None if line is None else json.loads(line)
        if isinstance(message, dict):
            message.pop("timestamp", None)
        if record:
            count = self._counts[label] = self._counts.get(label, 0) + 1
            self._case.transcript.add(self.name, f"{label} #{count}", message)
        return message

    def ask(self, message, label=None):
        """Sends a message and gives the next that is no event."""
        self.send(message)
        label = label or (message.get("execute") if isinstance(message, dict) and isinstance(message.get("execute"), str) else "raw")
        while True:
            answer = self.read(label)
            if answer is None or "event" not in answer:
                return answer

    def negotiate(self):
        """Leaves negotiation mode."""
        self.ask({"execute": "qmp_capabilities"})
        return self

    def close(self):
        """Hangs up."""
        self.socket.close()
