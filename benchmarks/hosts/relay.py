"""Relay of IP datagrams between TUN devices, which holds each datagram for a fixed time.

python benchmarks/hosts/relay.py MILLISECONDS DEVICE=ADDRESS DEVICE=ADDRESS ...

It stands for the wires between hosts on kernels without the queueing discipline `netem`. It makes
the TUN devices, prints "ready", and forwards until it is killed; the devices vanish with it. Every
IPv4 datagram leaves through the device that has its destination address, in the order of arrival;
all others are dropped.
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
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000  # whole IP datagrams, without a header of the driver
_LARGEST = 65536  # bytes of a datagram
_AT_ONCE = 32  # datagrams read from one device before others have a turn


def open_tun(name: str) -> int:
    """Makes a TUN device and returns its file descriptor, which does not block."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(
        descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
    )
    return descriptor


def destination(datagram: bytes) -> bytes | None:
    """Returns the destination address of an IPv4 datagram, and None for any other."""
    return datagram[16:20] if len(datagram) >= 20 and datagram[0] >> 4 == 4 else None


def relay(devices: dict[bytes, int], delay: float) -> None:
    """Forwards datagrams forever.

    Args:
      devices: file descriptor of the device that leads to each address.
      delay: seconds for which each datagram is held.
    """
    held: deque[tuple[float, int, bytes]] = deque()  # all wait equally long, so in order of time
    descriptors = list(devices.values())
    while True:
        pause = max(0.0, held[0][0] - time.monotonic()) if held else None
        ready, _, _ = select.select(descriptors, [], [], pause)
        for descriptor in ready:
            for _ in range(_AT_ONCE):
                try:
                    datagram = os.read(descriptor, _LARGEST)
                except OSError:  # nothing waits any more, or the device is not up yet
                    break
                to = devices.get(destination(datagram) or b"")
                if to is not None:
                    held.append((time.monotonic() + delay, to, datagram))
        while held and held[0][0] <= time.monotonic():
            _, to, datagram = held.popleft()
            try:
                os.write(to, datagram)
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
