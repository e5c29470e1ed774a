"""glibc's allocator in workers on CPUs: freed memory stays with the process.

A guided step allocates and frees temporaries of megabytes (log-probabilities of the vocabulary, gathered keys and
values). By default glibc returns such memory to the kernel, and the next step gets it again page by page.
"""

import ctypes

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 512 << 20
_LARGEST_BYTES = 32 << 20  # the most that glibc accepts for `M_MMAP_THRESHOLD`


def keep_freed_memory() -> bool:
    """Tells the C library to keep freed memory. Returns whether it does: only glibc can be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
