"""An NBD client of our own: several requests in flight, and what it hears is told as it comes."""

import asyncio
import struct

REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
READ, WRITE, DISCONNECT, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE = 1, 2
CAN_FLUSH, CAN_FUA, CAN_TRIM, CAN_ZERO, READ_ONLY = 1 << 2, 1 << 3, 1 << 5, 1 << 6, 1 << 1


class Lost(Exception):
    """The server has hung up, or never let us in."""


class Refused(Exception):
    """The server answered a request with an error."""


class Client:
    """A connection to an export."""

    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer
        self._waiting = {}
        self._cookie = 0
        self.size = self.flags = 0
        self._task = None

    @classmethod
    async def connect(cls, path, export):
        """Connects to `export` of the server at a Unix socket."""
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError as error:
            raise Lost(f"cannot connect: {error}") from None
        client = cls(reader, writer)
        try:
            await client._negotiate(export.encode())
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            writer.close()
            raise Lost(f"the server hung up: {error}") from None
        client._task = asyncio.ensure_future(client._receive())
        return client

    async def _negotiate(self, name):
        magic, option, flags = struct.unpack(">8s8sH", await self._reader.readexactly(18))
        assert (magic, option) == (b"NBDMAGIC", b"IHAVEOPT"), (magic, option)
        info = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._writer.write(struct.pack(">I", flags & 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(info)) + info)
        while True:
            _, _, kind, length = struct.unpack(">QIII", await self._reader.readexactly(20))
            data = await self._reader.readexactly(length)
            if kind == 1:
                return
            if kind & 1 << 31:
                self._writer.close()
                raise Lost(f"the export is refused: {data.decode(errors='replace')}")
            if struct.unpack(">H", data[:2])[0] == 0:
                self.size, self.flags = struct.unpack(">QH", data[2:12])

    async def _receive(self):
        try:
            while True:
                magic, error, cookie = REPLY.unpack(await self._reader.readexactly(REPLY.size))
                assert magic == 0x67446698, hex(magic)
                future, length = self._waiting.pop(cookie)
                data = await self._reader.readexactly(length) if not error and length else b""
                if not future.done():
                    future.set_result((error, data))
        except (asyncio.IncompleteReadError, ConnectionError, OSError) as error:
            self._lose(f"the server hung up: {error}")
        except asyncio.CancelledError:
            self._lose("disconnected")
            raise

    def _lose(self, why):
        waiting, self._waiting = self._waiting, None
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(Lost(why))

    async def request(self, command, offset=0, length=0, data=b"", flags=0):
        """One request, and its answer: the bytes of a read."""
        if self._waiting is None:
            raise Lost("the connection is gone")
        self._cookie += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting[self._cookie] = (future, length if command == READ else 0)
        self._writer.write(REQUEST.pack(0x25609513, flags, command, self._cookie, offset, length) + data)
        error, data = await future
        if error:
            raise Refused(f"error {error} for command {command} of {length} bytes at {offset}")
        return data

    def close(self):
        """Disconnects in order."""
        if self._waiting is not None:
            self._writer.write(REQUEST.pack(0x25609513, 0, DISCONNECT, 0, 0, 0))
        self._task.cancel()
        self._writer.close()

    def cut(self):
        """Hangs up in the middle of whatever there is."""
        self._task.cancel()
        self._writer.transport.abort()
