"""Hosts on one machine: network namespaces with links of a given bandwidth and delay.

    host 0 (netns) -- tbf --.
    host 1 (netns) -- tbf --+-- switch, which holds each datagram for the delay
    host 2 (netns) -- tbf --'

Each host sends at most `megabits` per second (`tc tbf`), and each datagram takes `delay`
milliseconds. The switch is a bridge whose ports have the queueing discipline `netem`, or, if the
kernel has no `netem`, the process `relay.py` on TUN devices. Needs root and the commands `ip` and
`tc`.
"""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_NAMES = Path("/etc/netns")
_NET = "10.77.0"
_MTU = 9000  # jumbo frames: a sixth of the datagrams, so that a relay in Python keeps up
_BURST = 64  # kilobytes that may leave at once
_QUEUE = 8  # megabytes that wait at a link before datagrams are lost


class Unavailable(Exception):
    """This machine cannot imitate hosts; the message says why."""


def run(*command: str) -> None:
    """Runs a command; raises Unavailable with its error output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")


class Network:
    """Network namespaces as hosts; a context manager that removes them in any case.

    Args:
      hosts: number of hosts.
      megabits: bandwidth of what each host sends, in Mbit/s.
      delay: milliseconds that each datagram takes, one way.

    Attributes:
      switch: "netem" or "relay", what delays the datagrams; "bridge" without a delay.

    Raises:
      Unavailable: not root, or a command or device is missing.
    """

    def __init__(self, hosts: int, megabits: float, delay: float):
        self.hosts, self.megabits, self.delay = hosts, megabits, delay
        self.switch = "bridge"
        self._tag = f"dgl{os.getpid() % 100000}"  # names of devices have at most 15 characters
        self._relay: subprocess.Popen[str] | None = None
        if os.geteuid():
            raise Unavailable("network namespaces need root")
        for command in ("ip", "tc"):
            if shutil.which(command) is None:
                raise Unavailable(f"the command {command} is missing (package iproute2)")

    def address(self, host: int) -> str:
        """Returns the address of a host."""
        return f"{_NET}.{host + 1}"

    def command(self, host: int, *command: str) -> list[str]:
        """Returns a command that runs another command on a host."""
        return ["ip", "netns", "exec", self._namespace(host), *command]

    def _namespace(self, host: int) -> str:
        return f"{self._tag}h{host}"

    def __enter__(self) -> "Network":
        try:
            for host in range(self.hosts):
                run("ip", "netns", "add", self._namespace(host))
                self._name(host)
                run(*self.command(host, "ip", "link", "set", "lo", "up"))
                # A connection keeps its speed over the pauses between two messages.
                setting = "/proc/sys/net/ipv4/tcp_slow_start_after_idle"
                with suppress(Unavailable):
                    run(*self.command(host, "sh", "-c", f"echo 0 > {setting}"))
            if self.delay and not self._has_netem():
                self._start_relay()
            else:
                self._make_bridge()
            for host in range(self.hosts):
                self._shape(host)
        except BaseException:
            self.close()
            raise
        return self

    def _name(self, host: int) -> None:
        """Lets the name of the machine lead to the address of a host.

        `ip netns exec` puts the files of this folder over the ones in /etc. JAX's collectives on
        the CPU (gloo) listen at the address of the machine's name.
        """
        folder = _NAMES / self._namespace(host)
        folder.mkdir(parents=True)
        lines = f"127.0.0.1 localhost\n{self.address(host)} {socket.gethostname()}\n"
        (folder / "hosts").write_text(lines)

    def _has_netem(self) -> bool:
        lo = self.command(0, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        if subprocess.run(lo, capture_output=True, timeout=30).returncode:
            return False
        run(*self.command(0, "tc", "qdisc", "del", "dev", "lo", "root"))
        return True

    def _make_bridge(self) -> None:
        bridge = f"{self._tag}b"
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "link", "set", bridge, "mtu", str(_MTU), "up")
        for host in range(self.hosts):
            port, inside = f"{self._tag}p{host}", self._device(host)
            run("ip", "link", "add", port, "type", "veth", "peer", "name", inside)
            run("ip", "link", "set", inside, "netns", self._namespace(host))
            run("ip", "link", "set", port, "mtu", str(_MTU), "master", bridge, "up")
            if self.delay:
                self.switch = "netem"
                queue = ("limit", str(_QUEUE * 1000000 // 1000))  # datagrams
                run(
                    "tc",
                    "qdisc",
                    "add",
                    "dev",
                    port,
                    "root",
                    "netem",
                    "delay",
                    f"{self.delay}ms",
                    *queue,
                )

    def _start_relay(self) -> None:
        if not os.path.exists("/dev/net/tun"):
            raise Unavailable("the kernel has neither tc netem nor /dev/net/tun")
        self.switch = "relay"
        pairs = [f"{self._device(host)}={self.address(host)}" for host in range(self.hosts)]
        script = Path(__file__).with_name("relay.py")
        self._relay = subprocess.Popen(
            [sys.executable, str(script), str(self.delay), *pairs],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != "ready\n":
            raise Unavailable("relay.py cannot make TUN devices")
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._relay.pid, -10)  # a wire does not wait for a CPU
        for host in range(self.hosts):
            run("ip", "link", "set", self._device(host), "netns", self._namespace(host))

    def _device(self, host: int) -> str:
        return f"{self._tag}d{host}"

    def _shape(self, host: int) -> None:
        device, there = self._device(host), self.command(host)
        run(*there, "ip", "address", "add", f"{self.address(host)}/24", "dev", device)
        run(*there, "ip", "link", "set", device, "mtu", str(_MTU), "up")
        run(*there, "ip", "link", "set", device, "txqueuelen", "1000")
        rate = ("rate", f"{self.megabits}mbit", "burst", f"{_BURST}kb", "limit", f"{_QUEUE}mb")
        run(*there, "tc", "qdisc", "add", "dev", device, "root", "tbf", *rate)

    def sent(self, host: int) -> int:
        """Returns the bytes that a host has sent, headers and everything else included."""
        path = f"/sys/class/net/{self._device(host)}/statistics/tx_bytes"
        # `ip netns exec` mounts the /sys of the namespace.
        shown = subprocess.run(
            self.command(host, "cat", path), capture_output=True, text=True, timeout=30, check=True
        )
        return int(shown.stdout)

    def close(self) -> None:
        """Ends the relay and removes namespaces and devices."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        for host in range(self.hosts):
            shutil.rmtree(_NAMES / self._namespace(host), ignore_errors=True)
        with suppress(OSError):
            _NAMES.rmdir()  # only if it is empty
        names = [self._namespace(host) for host in range(self.hosts)]
        removals: list[tuple[str, ...]] = [("ip", "netns", "del", name) for name in names]
        # Devices of a namespace vanish with it, and with them their other ends; without it they
        # may have stayed behind outside.
        removals += [("ip", "link", "del", f"{self._tag}p{host}") for host in range(self.hosts)]
        removals += [("ip", "link", "del", f"{self._tag}b")]
        for command in removals:
            subprocess.run(command, capture_output=True, timeout=30)

    def __exit__(self, *error: Any) -> None:
        self.close()
