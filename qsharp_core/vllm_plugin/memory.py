"""glibc's allocator in workers on CPUs: freed memory stays with the process.

A guided step makes and drops temporaries of megabytes (log-probabilities of the vocabulary, gathered keys and values).
glibc by default gives such memory back to the kernel and takes it again in the next step, page by page.
"""

import ctypes

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 512 << 20
_LARGEST_BYTES = 32 << 20  # the most that glibc takes for its second threshold


def keep_freed_memory() -> bool:
    """Whether the C library could be told to keep freed memory: not so where it is no glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
