"""One walk: a daemon, monitors and clients, and actions that are carried out one by one or beside each other."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
import traceback

from walks import effects, images
from walks.clients import SLOTS, Client
from walks.disk import Disk
from walks.qmp import Closed, Monitor
from walks.world import World

# Seconds that anything may take before it counts as hung.
PATIENCE = float(os.environ.get("HEADWATER_PATIENCE", "25"))

# Memory that a daemon may have at its end, in KiB: disks are a megabyte or two.
MEMORY = 400 << 10

SETTLED = ("paused", "standby", "ready")


class Broken(Exception):
    """The daemon did what no correct daemon does."""


class Walk:
    """A run of a sequence of actions against one daemon."""

    def __init__(self, program, folder, monitors=2, plain=False):
        self.program, self.folder = program, folder
        self.plain = plain  # only carries out, and judges nothing
        self.began = time.monotonic()
        self.world = World(self.clock)
        self.count = monitors
        self.failure = None
        self.ending = False
        self.leaving = set()  # exports that are told to go
        self.clients = []
        self.pending = []
        self.answers = []
        self.monitors = []
        self.child = None
        self.slow = set()  # jobs with a limit
        self.manual = {}  # the states in which a job waits for a command
        self.completing = set()  # jobs that were told to end
        self.requests = 0
        self.log = []

    def clock(self):
        """Seconds since the walk began."""
        return time.monotonic() - self.began

    def path(self, name):
        """A path in its folder."""
        return os.path.join(self.folder, name)

    def fail(self, text):
        """Something is wrong: the walk ends."""
        if self.failure is None:
            self.failure = f"at {self.clock():.2f} s: {text}"

    def told(self, text):
        """A line for who looks for the cause of a failure."""
        self.log.append(f"{self.clock():8.3f} {text}")

    async def start(self):
        """Starts the daemon."""
        words = [*self.program]
        for at in range(self.count):
            words += ["--chardev", f"socket,id=m{at},path=m{at}.sock,server=on,wait=off", "--monitor", f"chardev=m{at}"]
        words += ["--nbd-server", "addr.type=unix,addr.path=nbd.sock", "--pidfile", "daemon.pid"]
        with open(self.path("daemon.log"), "ab") as log:
            self.child = subprocess.Popen(words, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while not os.path.exists(self.path("daemon.pid")) or not os.path.getsize(self.path("daemon.pid")):
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise Broken(f"the daemon didn't start: {self.printed()}")
            await asyncio.sleep(0.005)
        self.monitors = [
            await asyncio.wait_for(Monitor.connect(self.path(f"m{at}.sock"), self._event if at == 0 else lambda event: None), PATIENCE)
            for at in range(self.count)
        ]

    def printed(self):
        """What the daemon printed."""
        with open(self.path("daemon.log"), encoding="utf-8", errors="replace") as log:
            return log.read()[-3000:]

    def _event(self, event):
        if self.plain:
            return
        try:
            self._heard(event)
        except Exception:
            # Nobody waits for the task that reads a monitor.
            self.fail("in the walk itself: " + traceback.format_exc())

    def _heard(self, event):
        name, data = event["event"], event.get("data", {})
        self.told(f"event {name} {data}")
        job = self.world.jobs.get(data.get("device", data.get("id")))
        if name == "BLOCK_JOB_COMPLETED" and job:
            if "error" in data and not self._refused_at_end(job) and not self._unequal(job, data["error"]):
                self.fail(f"job {job.name} failed, and nothing was wrong: {data['error']}")
            elif "error" in data:
                self.world.failed(job)
            else:
                self.world.completed(job)
        if name == "BLOCK_JOB_CANCELLED" and job:
            self.world.failed(job)
        if name == "BLOCK_JOB_ERROR":
            self.fail(f"{name}: {data}")
        if name == "JOB_STATUS_CHANGE" and data["status"] == "null" and job:
            self.world.failed(job)
            self.world.jobs.pop(job.name, None)
        if name == "BLOCK_EXPORT_DELETED":
            self.world.exports.pop(data["id"], None)
            self.leaving.discard(data["id"])

    def _refused_at_end(self, job):
        """Whether a job failed because users of its two nodes don't agree: that is found out when it is completed."""
        return (job.kind == "mirror" or job.active) and "complete" in job.asked and f"job '{job.name}' can't put" in self.printed()

    def _unequal(self, job, error):
        """Whether a mirror failed because its target has another size, which is told when it begins."""
        source, target = self.world.resolve(job.source), self.world.resolve(job.target)
        return job.kind == "mirror" and "different sizes" in error and source and target and source.disk.units != target.disk.units

    # Actions

    async def do(self, action):
        """Carries one action out."""
        kind = action["do"]
        if kind == "image":
            images.make(self, action)
        elif kind == "qmp":
            task = asyncio.ensure_future(self._command(action))
            self.pending.append((action, task))
            if action.get("wait", True):
                await task
        elif kind == "client":
            self._client(action)
        elif kind == "io":
            await self._io(action)
        elif kind == "stop":
            await self._stop(action["export"])
        elif kind == "sleep":
            await asyncio.sleep(action["ms"] / 1000)
        elif kind == "nodes":
            await self.look_at_nodes()
        elif kind == "kill":
            await self.kill()

    async def ask(self, command, monitor=0, **args):
        """A command outside of the sequence; what it returns."""
        try:
            reply = await asyncio.wait_for(self.monitors[monitor].ask(command, **args), PATIENCE)
        except asyncio.TimeoutError:
            raise Broken(f"{command}: no answer for {PATIENCE} s") from None
        except Closed:
            raise Broken(f"{command}: the daemon closed the monitor; it printed: {self.printed()}") from None
        return reply.get("return")

    async def _command(self, action):
        command, args = action["command"], action["args"]
        name = args.get("id") or args.get("device")
        job = self.world.jobs.get(name)
        if job and command.rsplit("-", 1)[-1] in ("complete", "cancel") and job.ending is None:
            job.ending = self.clock()
        if command == "block-export-del":
            self.leaving.add(args["id"])
        started = args.get("job-id", name)
        if args.get("speed") or args.get("sync") == "none":
            self.slow.add(started)
        if "job-id" in args and started not in self.manual:
            self.manual[started] = [state for state, flag in (("pending", "auto-finalize"), ("concluded", "auto-dismiss")) if args.get(flag) is False]
        memory = None if self.plain else effects.before(self.world, command, args)
        self.told(f"m{action.get('m', 0)} {command} {args}")
        try:
            reply = await asyncio.wait_for(self.monitors[action.get("m", 0)].ask(command, **args), PATIENCE)
        except asyncio.TimeoutError:
            raise Broken(f"{command} {args}: no answer for {PATIENCE} s") from None
        except Closed:
            if self.ending:
                return
            await asyncio.sleep(0.2)
            raise Broken(f"{command} {args}: the daemon closed the monitor ({self.child.poll()}); it printed: {self.printed()}") from None
        error = reply.get("error")
        self.told(f"m{action.get('m', 0)} {command}: {error or 'ok'}")
        self.answers.append((action, error))
        if error is None and command.rsplit("-", 1)[-1] in ("complete", "cancel"):
            self.completing.add(name)
        if self.plain:
            return
        if error and command == "block-export-del":
            self.leaving.discard(args["id"])
        if error and error["class"] not in ("GenericError", "DeviceNotFound", "DeviceNotActive"):
            self.fail(f"{command} {args}: an error of class {error['class']}: {error['desc']}")
        effects.after(self.world, command, args, error, memory)

    def _client(self, action):
        export = self.world.exports.get(action["export"])
        taken = {client.slot for client, task in self.clients if not task.done()}
        slot = next((slot for slot in range(SLOTS) if slot not in taken), None)
        if export is None or slot is None:
            return
        client = Client(self, export, slot, action["seed"])
        self.clients.append((client, asyncio.ensure_future(client.run())))

    async def _io(self, action):
        export = self.world.exports.get(action["export"])
        if export is not None:
            client = Client(self, export, 0, action["seed"])
            await self._bounded(client.run(action["count"]), f"requests of a client of {export.name}")
            self.requests += client.requests

    async def _stop(self, name):
        mine = [(client, task) for client, task in self.clients if client.export.name == name]
        for client, _ in mine:
            client.stop()
        for client, task in mine:
            await self._bounded(task, f"the last requests of a client of {name}")
            self.requests += client.requests
        self.clients = [pair for pair in self.clients if pair not in mine]

    async def _bounded(self, awaitable, what):
        try:
            return await asyncio.wait_for(awaitable, PATIENCE)
        except asyncio.TimeoutError:
            raise Broken(f"{what}: not done in {PATIENCE} s") from None

    def _moves(self, name, status):
        """Whether a job will be in another state soon, with nobody's doing."""
        if status == "running":
            return name not in self.slow
        if status in ("pending", "concluded"):
            return status not in self.manual.get(name, ())
        if status == "ready":
            return name in self.completing
        return status not in SETTLED

    async def look_at_nodes(self):
        """Forgets nodes that went with those that stood on them."""
        known = set(self.world.nodes)
        names = {node["node-name"] for node in await self.ask("query-named-block-nodes", flat=True)}
        await self.answered()
        if lost := self.world.gone(known - names):
            self.fail(f"nodes that commands made are gone: {lost}")

    async def settle(self):
        """Waits until no job changes by itself."""
        deadline = self.clock() + PATIENCE
        while self.failure is None:
            moving = [job for job in await self.ask("query-jobs") if self._moves(job["id"], job["status"])]
            if not moving:
                return
            if self.clock() > deadline:
                raise Broken(f"jobs don't come to rest: {moving}")
            await asyncio.sleep(0.01)

    # Ends

    async def answered(self):
        """Waits for commands that are still on their way."""
        pending, self.pending = self.pending, []
        for _, task in pending:
            await task

    async def finish(self):
        """Ends jobs, clients, and the daemon, in order, and looks at what is left."""
        await self.answered()
        await self._end_jobs()
        for name in {client.export.name for client, _ in self.clients}:
            await self._stop(name)
        await images.read_all(self)
        self._check_memory()
        self.ending = True
        await self.ask("quit")
        await self._ended()
        if self.child.returncode != 0:
            raise Broken(f"the daemon ended with {self.child.returncode}: {self.printed()}")
        images.check_all(self)

    async def _end_jobs(self):
        deadline = self.clock() + PATIENCE
        while jobs := await self.ask("query-jobs"):
            if self.clock() > deadline:
                raise Broken(f"jobs don't end when they are told to: {jobs}")
            for job in jobs:
                verb = {"paused": "job-resume", "standby": "job-resume", "pending": "job-finalize", "concluded": "job-dismiss"}.get(job["status"])
                if job["status"] in ("running", "ready"):
                    # Half of them do what they are there for.
                    known = self.world.jobs.get(job["id"])
                    # A backup that only saves what is changed has no end of its own.
                    useful = int(job["id"][1:]) % 2 == 0 and not (known and known.kind == "backup" and not known.whole)
                    verb = "job-complete" if useful and job["status"] == "ready" else "job-cancel"
                    if useful and job["status"] == "running":
                        await self._command({"command": "block-job-set-speed", "args": {"device": job["id"], "speed": 0}})
                        continue
                if verb:
                    await self._command({"command": verb, "args": {"id": job["id"]}})
            await asyncio.sleep(0.02)

    def _check_memory(self):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{self.child.pid}/status", encoding="ascii") as status:
            used = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
            if used > MEMORY:
                self.fail(f"the daemon has {used} KiB of memory")

    async def kill(self):
        """Kills the daemon, and looks at what was answered."""
        self.ending = True
        self.child.send_signal(signal.SIGKILL)
        await self._ended()
        for _, task in self.clients:
            await self._bounded(task, "a client of a killed daemon")
        unanswered = [action for action, task in self.pending if not task.done()]
        for _, task in self.pending:
            with contextlib.suppress(Broken):
                await task
        self.pending, self.clients = [], []
        self._doubt(unanswered)
        images.check_all(self, killed=True)

    def _doubt(self, unanswered):
        """Forgets of images what was just being decided when it was killed: which of two a disk goes on in."""
        names = [name for job in self.world.jobs.values() if job.ending is not None for name in (job.source, job.target)]
        for action in unanswered:
            steps = action["args"].get("actions") or [{"data": action["args"]}]
            names += [step["data"].get(key) for step in steps for key in ("node", "node-name", "overlay", "snapshot-node-name", "device")]
        for image in filter(None, map(self.world.resolve, filter(None, names))):
            image.disk = Disk.unknown(image.disk.units)

    async def _ended(self):
        deadline = time.monotonic() + PATIENCE
        while self.child.poll() is None:
            if time.monotonic() > deadline:
                raise Broken(f"the daemon didn't end: {self.printed()}")
            await asyncio.sleep(0.01)

    async def abandon(self):
        """Ends whatever is left."""
        self.ending = True
        if self.child and self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        for client, task in self.clients:
            task.cancel()
        for _, task in self.pending:
            task.cancel()
        for monitor in self.monitors:
            monitor.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
