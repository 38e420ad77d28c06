"""Clients of exports: each changes stripes of a disk that are its own, and reads everywhere."""

import asyncio
import random

from walks import nbd
from walks.disk import DISCARDED, UNIT, ZERO, pattern, serials

# The disk is divided into stripes; a client writes to each SLOTS-th of them. No multiple of a cluster's size.
SLOTS = 6
STRIPE = 40

# The most that is read at once, in units.
READ = 512

# Requests of one client that are on their way at once.
DEPTH = 3


class Client:
    """A client of an export, with a random sequence of its own."""

    def __init__(self, walk, export, slot, seed):
        self.walk, self.export, self.slot = walk, export, slot
        self.random = random.Random(seed)
        self._busy = set()
        self._stopping = False
        self._nbd = None
        self.requests = 0

    async def run(self, count=None):
        """Sends requests until it is stopped, or so many."""
        try:
            self._nbd = await nbd.Client.connect(self.walk.path("nbd.sock"), self.export.name)
        except nbd.Lost as error:
            if not self._excused():
                self.walk.fail(f"client of {self.export.name}: {error}")
            return
        lanes = [self._lane(None if count is None else -(-count // DEPTH)) for _ in range(DEPTH)]
        try:
            await asyncio.gather(*lanes)
            self._nbd.close()
        except nbd.Lost as error:
            if not self._excused():
                self.walk.fail(f"client of {self.export.name}: {error}")
        finally:
            self._stopping = True
            self._nbd.cut()

    def stop(self):
        """No more requests."""
        self._stopping = True

    def _excused(self):
        """Whether its connection may be gone."""
        return self.walk.ending or self.export.odd or self.walk.world.exports.get(self.export.name) is not self.export or self.export.name in self.walk.leaving

    async def _lane(self, count):
        while not self._stopping and count != 0:
            count = None if count is None else count - 1
            self.requests += 1
            try:
                await self._one()
            except nbd.Refused as error:
                if not self._excused():
                    self.walk.fail(f"client of {self.export.name}: {error}")
                return
            if self.random.random() < 0.2:
                await asyncio.sleep(self.random.random() * 0.004)

    async def _one(self):
        kind = self.random.choice(("read", "read", "write", "write", "write", "zero", "trim", "flush"))
        if not self.export.writable or self._nbd.flags & nbd.READ_ONLY:
            kind = "read"
        units = self._nbd.size // UNIT
        if kind == "flush":
            await self._nbd.request(nbd.FLUSH)
        elif kind == "read":
            first = self.random.randrange(units)
            await self._read(first, min(self.random.choice((1, 7, 128, READ)), units - first))
        else:
            await self._change(kind, units)

    async def _read(self, first, count):
        world, since = self.walk.world, self.walk.clock()
        one = world.disk_of(self.export)
        data = await self._nbd.request(nbd.READ, first * UNIT, count * UNIT)
        other, until = world.disk_of(self.export), self.walk.clock()
        wrong = None
        for disk in (one, other):
            # While an image gives its disk to another one, it is either.
            if disk is None or disk.units < first + count:
                return
            wrong = disk.wrong(first, data, since, until)
            if wrong is None:
                return
        if world.exports.get(self.export.name) is self.export:
            self.walk.fail(f"{self.export.name} (node {self.export.node}), read at {first}+{count}: {wrong}")

    async def _change(self, kind, units):
        stripes = [at for at in range(self.slot, -(-units // STRIPE), SLOTS) if at not in self._busy]
        if not stripes:
            await asyncio.sleep(0.001)
            return
        stripe = self.random.choice(stripes)
        room = min(STRIPE, units - stripe * STRIPE)
        start = self.random.randrange(room)
        count = self.random.randrange(1, room - start + 1)
        first = stripe * STRIPE + start
        value = {"write": next(serials), "zero": ZERO, "trim": DISCARDED}[kind]
        disk = self.walk.world.writable_disk(self.export)
        if disk is None or disk.units < first + count:
            await asyncio.sleep(0.001)
            return
        self._busy.add(stripe)
        write = disk.begin(first, count, value, self.walk.clock())
        flags = nbd.FUA if self.random.random() < 0.1 else 0
        command, data = nbd.WRITE, b""
        if kind == "write":
            data = b"".join(pattern(value, first + at) for at in range(count))
        else:
            command = nbd.ZEROES if kind == "zero" else nbd.TRIM
            flags |= nbd.NO_HOLE if kind == "zero" and self.random.random() < 0.3 else 0
        await self._nbd.request(command, first * UNIT, count * UNIT, data, flags)
        disk.end(write, self.walk.clock())
        self._busy.discard(stripe)
