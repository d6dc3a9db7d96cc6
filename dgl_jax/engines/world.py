"""Processes of a distributed run: they join, exchange small values, and end together.

Only this file names `jax.distributed` and its coordination service. A run of one process needs no
service: every function then returns at once.

All processes execute the same program, so they call `exchange`, `from_first` and `barrier` in the
same order. Arrays never pass through here, see `transfer`.
"""

import ipaddress
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import jax

from dgl_jax.errors import UserError

_LOG = logging.getLogger(__name__)
_FOREVER = 2**31 - 1  # milliseconds; the heartbeat ends a wait for a process that died
_A_DAY = 86_400  # seconds
_NOTICE_SECONDS = 1.0  # between two questions if another process has failed
_JOIN_SECONDS = 60.0  # for which a process with an early error waits for the others
_SILENT_SECONDS = 10.0  # after which it says that it waits
_LAST_SECONDS = 6.0  # for which the coordinator waits until the others know of a failure
_PREFIX = "dgl_jax"

_ABSENT = (
    "--distributed: not all processes joined within {} s; the same command has to run on every "
    "host, and reach --coordinator if that is given"
)

T = TypeVar("T")


class _State:
    """State of this process in its world."""

    index = 0
    count = 1
    client: Any = None
    told = False  # this process has printed its error


_calls = itertools.count()


def index() -> int:
    """Returns the number of this process, from 0."""
    return _State.index


def count() -> int:
    """Returns the number of processes of the run."""
    return _State.count


def first() -> bool:
    """Returns True in the process that writes files and draws the progress bar."""
    return _State.index == 0


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat: int = 100,
    start_seconds: int = 300,
    bind: bool = True,
    on_cpu: bool = False,
) -> None:
    """Joins the processes of a run; call it before anything asks JAX for devices.

    Args:
      coordinator: address `host:port` of the first process; None: from the cluster's environment.
      processes: number of processes; None: likewise.
      process: number of this process; None: likewise.
      heartbeat: seconds after which a process that died ends the others.
      start_seconds: seconds to wait until all processes have joined.
      bind: True to listen on the coordinator's address alone. JAX listens on all interfaces.
      on_cpu: True if the devices are CPU devices, which need addresses for their transfers.

    Raises:
      UserError: the addresses are not valid, no cluster was found, or not all processes joined.
    """
    host = None
    if coordinator is not None:
        host, colon, port = coordinator.rpartition(":")
        if not colon or not host or not port.isdecimal():
            raise UserError(
                f"--coordinator={coordinator}: must be host:port, such as 10.0.0.1:8000"
            )
    # A process may compile for long while its neighbor waits; the heartbeat notices its death.
    jax.config.update("jax_cross_host_transfer_timeout_seconds", _A_DAY)
    if on_cpu:
        _set_cpu_addresses(host)
    # After the time that JAX itself is given, it aborts the process without a word of advice.
    late = threading.Timer(start_seconds, _exit, [_ABSENT.format(start_seconds), 2])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            *(coordinator, processes, process),
            initialization_timeout=start_seconds + 60,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=30,
            coordinator_bind_address=coordinator if bind else None,
        )
    except (ValueError, RuntimeError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"--distributed: the processes could not join ({reason}); give all of them the same "
            "--coordinator=host:port and --num_processes, and each its own --process_id"
        ) from error
    finally:
        late.cancel()
    from jax._src.distributed import global_state  # JAX has no public door to the service

    _State.client = global_state.client
    _chatter_to_stderr()
    _State.index, _State.count = jax.process_index(), jax.process_count()
    if jax.default_backend() == "cpu" and not on_cpu:
        raise UserError(
            "--distributed: there are only CPU devices; add --cpu_devices=1 to train on them"
        )
    if _State.count > 1:
        threading.Thread(target=_watch, daemon=True).start()


def _chatter_to_stderr() -> None:
    """Sends what C++ libraries print to standard error: standard output is for results."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def _set_cpu_addresses(host: str | None) -> None:
    """Sets the addresses at which CPU devices receive arrays from other processes."""
    address = own_address(host)
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    # With port 0 the transfers would hang. The default of the second option is all interfaces.
    jax.config.update("jax_cross_host_transfer_socket_address", f"{address}:{port}")
    jax.config.update("jax_cross_host_transport_addresses", f"{address}:0,{address}:0")


def own_address(host: str | None) -> str:
    """Returns the address of this machine on the network of the coordinator.

    Args:
      host: name or address of the coordinator; None: unknown, which gives the machine's own name.

    Raises:
      UserError: the name cannot be resolved.
    """
    host = host or socket.gethostname()
    try:
        address = socket.gethostbyname(host.strip("[]"))
        if ipaddress.ip_address(address).is_loopback:
            return address
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(f"--coordinator: {host}: {error.strerror or error}") from error


def exchange(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, ordered by process.

    Every process has to call it. In a run of one process the value is returned unchanged.
    """
    if _State.count == 1:
        return [value]
    client, call = _State.client, next(_calls)
    folder = f"{_PREFIX}/exchange/{call}"
    client.key_value_set(f"{folder}/{_State.index}", json.dumps(value))
    if not first():
        values: list[Any] = json.loads(client.blocking_key_value_get(f"{folder}/all", _FOREVER))
        return values
    texts = [client.blocking_key_value_get(f"{folder}/{i}", _FOREVER) for i in range(_State.count)]
    client.key_value_set(f"{folder}/all", f"[{','.join(texts)}]")
    # All processes have read the values of the call before, or they would not be here.
    with suppress(Exception):
        client.key_value_delete(f"{_PREFIX}/exchange/{call - 1}/")
    return [json.loads(text) for text in texts]


def from_first(make: Callable[[], T]) -> T:
    """Returns what a function returns in the first process, in all processes, as a JSON value.

    The other processes do not call the function. A run of one process just calls it.
    """
    if _State.count == 1:
        return make()
    value: T = exchange(make() if first() else None)[0]
    return value


def barrier() -> None:
    """Waits until every process has reached this call."""
    exchange(None)


def merged(rows: dict[str, Any]) -> dict[str, Any]:
    """Returns the union of the dicts of all processes; the first process that has a key wins."""
    every: dict[str, Any] = {}
    for values in reversed(exchange(rows)):
        every |= values
    return every


def publish(key: str, value: str) -> None:
    """Stores a value that other processes read with `awaited` or `published`."""
    _State.client.key_value_set(f"{_PREFIX}/{key}", value)


def awaited(key: str) -> str:
    """Returns a published value; waits until it is there."""
    value: str = _State.client.blocking_key_value_get(f"{_PREFIX}/{key}", _FOREVER)
    return value


def published(folder: str) -> list[str]:
    """Returns the values published below a folder, without waiting."""
    return [value for _, value in _State.client.key_value_dir_get(f"{_PREFIX}/{folder}/")]


def forget(key: str) -> None:
    """Removes a published value, or a folder of them if `key` ends with a slash."""
    with suppress(Exception):
        _State.client.key_value_delete(f"{_PREFIX}/{key}")


def signal() -> None:
    """Tells the first process, once, that this one has been asked to stop."""
    with suppress(Exception):  # it has been told before
        publish(f"signals/{_State.index}", "")


@contextmanager
def together() -> Iterator[None]:
    """Ends all processes together at the end of a `with` block, or if one of them has an error.

    After an error each process prints one line and exits: with 2 after a UserError, otherwise with
    1. Without it the others would wait for messages of the failed one. At the end of the block all
    processes wait for each other and exit, with the code of `SystemExit` if it was raised. A run of
    one process continues after the block.
    """
    if _State.count == 1:
        yield
        return
    code: Any = 0
    try:
        yield
    except SystemExit as leaving:
        code = leaving.code
    except UserError as error:
        _fail(f"{error}", 2)
    except BaseException as error:
        traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}", 1)
    barrier()  # a process that leaves takes the messages with it that others have not yet read
    jax.distributed.shutdown()
    # The threads that move arrays between processes abort an ordinary exit.
    _flush()
    os._exit(code if isinstance(code, int) else 1)


def fail_early(join: Callable[[], None], message: str, seconds: float = _JOIN_SECONDS) -> None:
    """Reports an error that this process has printed, found before it joined, and exits with 2.

    Joins the others for that: they wait for this process and would not know why.

    Args:
      join: calls the function `join` above.
      message: the error, in one line.
      seconds: exits after this time at the latest, whether or not the others could be told.
    """

    connected = threading.Event()

    def tell() -> None:
        with suppress(BaseException):  # such as a coordinator that is not there, or another mistake
            if _State.client is None:
                join()
        if _State.count > 1:
            connected.set()
            _fail(message, 2)

    _State.told = True
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    with suppress(KeyboardInterrupt):
        thread.join(min(seconds, _SILENT_SECONDS))
        if thread.is_alive() and seconds > _SILENT_SECONDS:
            text = f"telling the other processes ({seconds:g} s at most)"
            print(text, file=sys.stderr, flush=True)
            thread.join(seconds - _SILENT_SECONDS)
        if connected.is_set():
            thread.join(2 * _LAST_SECONDS)
    _flush()
    os._exit(2)


def _fail(message: str, code: int) -> None:
    """Reports an error to all processes and exits."""
    with suppress(Exception):  # another process may have failed first
        publish("error", json.dumps([_State.index, message, code]))
    _exit(message, code)


def _watch() -> None:
    """Exits as soon as another process has reported an error."""
    while True:
        time.sleep(_NOTICE_SECONDS)
        try:
            text = _State.client.key_value_try_get(f"{_PREFIX}/error")
        except Exception:  # there is no error
            continue
        process, message, code = json.loads(text)
        if process != _State.index:
            _exit(f"process {process}: {message}", code)
        return


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _say(message: str) -> None:
    """Prints an error, unless this process has printed one already."""
    if not _State.told:
        print(f"error: {message}", file=sys.stderr)
    _State.told = True


_EXIT = threading.Lock()


def _exit(message: str, code: int) -> None:
    """Prints one line and exits at once: the usual way out would wait for the other processes."""
    with _EXIT:
        _say(message)
        _flush()
        with suppress(Exception):
            publish(f"gone/{_State.index}", "")
            # The service ends with the first process, and takes down everyone still connected.
            end = time.monotonic() + _LAST_SECONDS
            while first() and len(published("gone")) < _State.count and time.monotonic() < end:
                time.sleep(0.1)
        os._exit(code)
