"""A disk that a machine's firmware boots: its first sector says so on the serial line, and resets the machine."""

SAYS = b"guest: booted by the firmware\r\n"


def make(path):
    """A raw image of 8 MiB."""
    code = bytearray()
    code += b"\xfa\x31\xc0\x8e\xd8"  # cli; xor ax, ax; mov ds, ax
    code += b"\xbe\0\0"  # mov si, the text
    text = len(code) - 2
    code += b"\xba\xf8\x03"  # mov dx, the serial port
    code += b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"  # next: lodsb; test al, al; jz done; out dx, al; jmp next
    code += b"\xb0\xfe\xe6\x64\xf4\xeb\xfd"  # done: mov al, 0xfe; out 0x64, al; wait: hlt; jmp wait
    code[text : text + 2] = (0x7C00 + len(code)).to_bytes(2, "little")
    sector = (bytes(code) + SAYS + b"\0").ljust(510, b"\0") + b"\x55\xaa"
    path.write_bytes(sector.ljust(8 << 20, b"\0"))
