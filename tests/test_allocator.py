import subprocess
import sys

import pytest

from dgl_jax import allocator

# Page faults of filling 128 MiB again and again, with memory as the system gives it and with memory that is kept.
FAULTS = """
import ctypes, platform, resource
from dgl_jax import allocator

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        block = libc.malloc(2**27)
        ctypes.memset(block, 1, 2**27)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults(4)
kept = allocator.keep_freed()
faults(1)
print(platform.libc_ver()[0] or "none", kept, fresh, faults(4))
"""


def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    library, kept, fresh, again = done.stdout.split()
    assert kept == str(library == "glibc")
    if library == "glibc":
        assert int(again) < 64  # of 4 x 32,768 pages of 4 KiB, or 4 x 64 large ones
        assert int(fresh) > 4 * 32


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_other_libraries_are_left_alone(error, monkeypatch):
    def without(name):
        raise error

    monkeypatch.setattr(allocator.ctypes, "CDLL", without)
    assert not allocator.keep_freed()
