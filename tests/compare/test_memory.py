"""A comparison makes many students in one process."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from distill_sampler.compare.student import give_back_memory


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(
    sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="only glibc keeps what was freed"
)
def test_what_was_freed_is_given_back() -> None:
    freed = np.ones(2_000_000)
    del freed  # a first large block that is freed teaches glibc to keep such blocks
    give_back_memory()
    before = resident_megabytes()
    arrays = [np.ones(100_000) for _ in range(400)]
    above = arrays[-1]  # what keeps the heap from shrinking by itself
    del arrays
    assert resident_megabytes() > before + 250, "nothing is given back by itself"
    give_back_memory()
    assert resident_megabytes() < before + 100
    assert above.all()
