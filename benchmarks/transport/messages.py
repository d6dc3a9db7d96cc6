"""Sends messages to another process, and receives them; `run.py` starts both processes.

Process 0 prints the seconds per message as JSON: for each size, way and transport one value per
repeat.
"""

import argparse
import json
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from dgl_jax.engines import world
from dgl_jax.engines.pace import Announcer, Follower
from dgl_jax.engines.placement import assign
from dgl_jax.engines.transfer import distribute, put

BATCH = 64
IN_FLIGHT = 3
KIB, MIB = 2**10, 2**20
COUNTS = {64 * KIB: 100, 2 * MIB: 24, 8 * MIB: 8}  # messages per repeat, by bytes per message
Wait = Callable[[], Any]


class Transport(Protocol):
    """Way in which one message at a time crosses from one process to the other."""

    def send(self) -> None:
        """Starts to send the message to the other process."""

    def receive(self) -> Wait:
        """Starts to receive a message; the result waits for it and returns it."""


class Tcp:
    """Sends the bytes of a message through a socket and receives them into one buffer."""

    def __init__(self, peer: socket.socket, message: np.ndarray):
        self._peer, self._bytes = peer, message.tobytes()
        self._buffer = bytearray(message.nbytes)

    def send(self) -> None:
        """Returns as soon as the kernel has taken all bytes."""
        self._peer.sendall(self._bytes)

    def receive(self) -> Wait:
        """Receives the whole message, so that the result does not have to wait."""
        view = memoryview(self._buffer)
        while view:
            view = view[self._peer.recv_into(view) :]
        return lambda: np.frombuffer(self._buffer, np.float32)


class Put:
    """Moves an array between the devices of the two processes, like a hop of the pipeline."""

    def __init__(self, message: np.ndarray):
        placement = assign(jax.devices(), 2)
        self._here, self._there = (placement.split(k) for k in (world.index(), 1 - world.index()))
        self._sent = distribute(message, self._here)
        # Stands for the array of the other process, which makes the same call.
        self._handle = distribute(message, self._there)

    def send(self) -> None:
        """Returns before the message has arrived."""
        put(self._sent, self._there)

    def receive(self) -> Wait:
        """Returns once the other process has called `send`, before the message has arrived."""
        array = put(self._handle, self._here)
        return lambda: jax.block_until_ready(array)


class Acknowledged:
    """Counts the messages that have arrived, with one byte per message through the socket."""

    def __init__(self, peer: socket.socket):
        self._peer = peer

    def tell(self) -> None:
        """Tells the sender that one more message has arrived."""
        self._peer.sendall(b"!")

    def wait(self) -> None:
        """Waits until one more message has arrived."""
        if not self._peer.recv(1):
            raise ConnectionError("the other process has closed its socket")


class Announced:
    """Counts the messages that have arrived through the coordinator, as the pipeline does."""

    def __init__(self) -> None:
        # One stream for all repeats: the places of its values count the messages.
        self._arrived = Announcer("arrived", forget=True) if world.index() else None
        self._follower = None if world.index() else Follower("arrived")
        self._place = 0

    def tell(self) -> None:
        """Tells the sender that one more message has arrived."""
        assert self._arrived
        self._arrived.put()

    def wait(self) -> None:
        """Waits until one more message has arrived."""
        assert self._follower
        self._follower.get(self._place)
        self._place += 1

    def close(self) -> None:
        """Ends the stream in both processes."""
        for end in (self._arrived, self._follower):
            if end is not None:
                end.close()


def connect() -> socket.socket:
    """Returns a socket that is connected with the other process."""
    if world.index() == 0:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            world.publish("port", str(listening.getsockname()[1]))
            peer, _ = listening.accept()
    else:
        peer = socket.create_connection(("127.0.0.1", int(world.awaited("port"))))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def one_way(transport: Transport, arrived: Acknowledged | Announced, count: int) -> None:
    """Sends messages from process 0 to process 1, with at most `IN_FLIGHT` not yet arrived."""
    if world.index() == 0:
        for i in range(count + IN_FLIGHT):
            if i >= IN_FLIGHT:
                arrived.wait()
            if i < count:
                transport.send()
        return
    waiting: deque[Wait] = deque()
    for i in range(count + IN_FLIGHT):
        if i >= IN_FLIGHT:
            waiting.popleft()()
            arrived.tell()
        if i < count:
            waiting.append(transport.receive())


def round_trip(transport: Transport, count: int) -> None:
    """Sends a message from process 0 to process 1 and one back, `count` times."""
    for _ in range(count):
        if world.index() == 0:
            transport.send()
            transport.receive()()
        else:
            transport.receive()()
            transport.send()


def check(transport: Transport, message: np.ndarray) -> None:
    """Raises AssertionError unless a message arrives with the values that were sent."""
    if world.index() == 0:
        transport.send()
        return
    arrived = transport.receive()()
    values = arrived.addressable_data(0) if isinstance(arrived, jax.Array) else arrived
    assert np.array_equal(np.ravel(values), np.ravel(message))


def measured(repeats: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Measures seconds per message by size, way and transport; valid in process 0."""
    peer = connect()
    byte, announced = Acknowledged(peer), Announced()
    cases = []
    for size_in_bytes, messages in COUNTS.items():
        message = np.arange(size_in_bytes // 4, dtype=np.float32).reshape(BATCH, -1)
        tcp, array = Tcp(peer, message), Put(message)
        check(tcp, message)
        check(array, message)
        ways: dict[tuple[str, str], Callable[[int], None]] = {
            ("one way", "tcp"): partial(one_way, tcp, byte),
            ("one way", "put"): partial(one_way, array, byte),
            ("one way", "put, paced"): partial(one_way, array, announced),
            ("round trip", "tcp"): partial(round_trip, tcp),
            ("round trip", "put"): partial(round_trip, array),
        }
        cases += [(str(size_in_bytes), *names, run, messages) for names, run in ways.items()]
    spent: dict[str, dict[str, dict[str, list[float]]]] = {}
    for repeat in range(repeats + 1):
        for size, way, name, run, count in cases:
            if world.index():  # ready; process 0 begins
                byte.tell()
            else:
                byte.wait()
            begin = time.perf_counter()
            run(count)
            seconds = (time.perf_counter() - begin) / count
            if repeat:  # the first one warms up
                spent.setdefault(size, {}).setdefault(way, {}).setdefault(name, []).append(seconds)
        cases.append(cases.pop(0))  # another one comes first in each repeat
    announced.close()
    peer.close()
    return spent


def main() -> None:
    """Joins the other process, sends messages and prints the times."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--coordinator", required=True)
    flags.add_argument("--process_id", type=int, required=True)
    flags.add_argument("--repeats", type=int, required=True)
    args = flags.parse_args()
    jax.config.update("jax_num_cpu_devices", 1)
    world.join(args.coordinator, 2, args.process_id, heartbeat=20, on_cpu=True)
    with world.together():
        spent = measured(args.repeats)
        if world.first():
            print(json.dumps(spent))


if __name__ == "__main__":
    main()
