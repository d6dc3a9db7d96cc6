"""What the C library does with memory that was freed. Changes the whole process, so only a program that owns it may ask for this.

XLA's CPU client allocates the temporary memory of a program anew at each of its calls. glibc takes blocks of that size from the
system and gives them back when they are freed, so that every step begins by touching all its memory page by page: a fifth of its
processor time. Kept, the memory is there (benchmarks/cpu_reference).
"""

import ctypes

# Of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Makes malloc keep freed memory for the next block: the process stays as large as it has once been.

    To be called before threads are started: one arena serves all that come later.

    Returns:
      Whether it does now: only glibc's malloc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another system, or another C library
        return False
    return all([mallopt(option, value) for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))])
