"""A disk that the firmware boots: its first sector reads the second over itself, which says so on the serial line and resets the machine."""

SAYS = b"guest: booted by the firmware\r\n"
# Where the firmware puts the first sector, and where that goes out of the way.
PLACE, ASIDE = 0x7C00, 0x600


def word(number):
    return number.to_bytes(2, "little")


def first():
    """Code that moves aside, reads the second sector to where it was itself, and jumps there."""
    code = bytearray()
    code += b"\xfa\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0"  # cli; xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax
    code += b"\xbc" + word(PLACE) + b"\xbe" + word(PLACE) + b"\xbf" + word(ASIDE)  # mov sp, PLACE; mov si, PLACE; mov di, ASIDE
    code += b"\xb9" + word(256) + b"\xfc\xf3\xa5"  # mov cx, 256; cld; rep movsw
    code += b"\xea" + word(ASIDE + len(code) + 5) + word(0)  # jmp 0:next, in the copy
    packet = ASIDE + len(code) + 13
    code += b"\xfb\xb4\x42\xbe" + word(packet) + b"\xcd\x13"  # sti; mov ah, 0x42; mov si, packet; int 0x13
    code += b"\xea" + word(PLACE) + word(0)  # jmp 0:PLACE
    code += b"\x10\0\x01\0" + word(PLACE) + word(0) + (1).to_bytes(8, "little")  # packet: one sector, to PLACE, sector 1
    return bytes(code)


def second():
    """Code that says it."""
    code = bytearray()
    code += b"\xfa\x31\xc0\x8e\xd8"  # cli; xor ax, ax; mov ds, ax
    code += b"\xbe\0\0"  # mov si, the text
    text = len(code) - 2
    code += b"\xba\xf8\x03"  # mov dx, the serial port
    code += b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"  # next: lodsb; test al, al; jz done; out dx, al; jmp next
    code += b"\xb0\xfe\xe6\x64\xf4\xeb\xfd"  # done: mov al, 0xfe; out 0x64, al; wait: hlt; jmp wait
    code[text : text + 2] = word(PLACE + len(code))
    return bytes(code) + SAYS + b"\0"


def make(path):
    """A raw image of 8 MiB."""
    sectors = first().ljust(510, b"\0") + b"\x55\xaa" + second().ljust(512, b"\0")
    path.write_bytes(sectors.ljust(8 << 20, b"\0"))
