"""A QMP client: several commands on their way at once, and every event told as it comes."""

import asyncio
import json


class Closed(Exception):
    """The daemon has closed the monitor."""


class Monitor:
    """A connection to a monitor. `listen` is called with each event."""

    def __init__(self, reader, writer, listen):
        self._reader, self._writer, self._listen = reader, writer, listen
        self._waiting = {}
        self._number = 0
        self._task = None

    @classmethod
    async def connect(cls, path, listen=lambda event: None):
        """Connects and leaves negotiation mode."""
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 24)
        monitor = cls(reader, writer, listen)
        await reader.readline()
        monitor._task = asyncio.ensure_future(monitor._receive())
        await monitor.ask("qmp_capabilities")
        return monitor

    async def _receive(self):
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self._listen(message)
                elif message.get("id") in self._waiting:
                    future = self._waiting.pop(message["id"])
                    if not future.done():
                        future.set_result(message)
        except (ConnectionError, asyncio.CancelledError):
            pass
        waiting, self._waiting = self._waiting, None
        for future in waiting.values():
            if not future.done():
                future.set_exception(Closed("the daemon closed the monitor"))

    async def ask(self, command, **arguments):
        """The reply to a command: a dictionary with `return` or `error`."""
        if self._waiting is None:
            raise Closed("the monitor is closed")
        self._number += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[self._number] = future
        message = {"execute": command, "arguments": arguments, "id": self._number}
        self._writer.write(json.dumps(message).encode() + b"\n")
        return await future

    def close(self):
        """Hangs up."""
        self._task.cancel()
        self._writer.close()
