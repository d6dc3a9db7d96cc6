"""Relay of IP packets between TUN devices, which holds each packet for a fixed time.

python benchmarks/hosts/relay.py MILLISECONDS DEVICE=ADDRESS DEVICE=ADDRESS ...

It stands for the wires between hosts on kernels without the queueing discipline `netem`. It makes
the TUN devices, prints "ready", and forwards until it is killed; the devices vanish with it. Every
packet (IPv4, anything else is dropped) leaves through the device that has its destination address.
Losing no packet and keeping their order, it adds to the time of a packet only what the system needs
to run it.
"""

import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000  # whole IP packets, without a header of the driver
_LARGEST = 65536  # bytes of a packet
_AT_ONCE = 32  # packets read from one device before others have a turn


def open_tun(name: str) -> int:
    """Makes a TUN device and returns its file descriptor, which does not block."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(
        descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
    )
    return descriptor


def destination(packet: bytes) -> bytes | None:
    """Returns the destination address of an IPv4 packet, and None for any other."""
    return packet[16:20] if len(packet) >= 20 and packet[0] >> 4 == 4 else None


def relay(devices: dict[bytes, int], delay: float) -> None:
    """Forwards packets forever.

    Args:
      devices: file descriptor of the device that leads to each address.
      delay: seconds for which each packet is held.
    """
    held: deque[tuple[float, int, bytes]] = deque()  # all wait equally long, so in order of time
    descriptors = list(devices.values())
    while True:
        pause = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready, _, _ = select.select(descriptors, [], [], pause)
        for descriptor in ready:
            for _ in range(_AT_ONCE):
                try:
                    packet = os.read(descriptor, _LARGEST)
                except OSError:  # nothing waits any more, or the device is not up yet
                    break
                to = devices.get(destination(packet) or b"")
                if to is not None:
                    held.append((time.monotonic() + delay, to, packet))
        while held and held[0][0] <= time.monotonic():
            _, to, packet = held.popleft()
            try:
                os.write(to, packet)
            except OSError:  # the device is down: a host that has left receives nothing
                continue


def main() -> None:
    delay, *pairs = sys.argv[1:]
    devices = {}
    for pair in pairs:
        name, _, address = pair.partition("=")
        devices[socket.inet_aton(address)] = open_tun(name)
    print("ready", flush=True)
    relay(devices, float(delay) / 1e3)


if __name__ == "__main__":
    main()
