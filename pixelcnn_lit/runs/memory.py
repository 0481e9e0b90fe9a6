"""Memory of tensors that are gone, kept for those that come."""

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Let glibc's malloc keep the memory of tensors that are gone, those of up to 1 GiB, for those that come.

    It hands large blocks back to the kernel at once, and each step then pays for thousands of new pages. No other
    system's malloc has these settings, and none is touched there.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # all that an old glibc takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
