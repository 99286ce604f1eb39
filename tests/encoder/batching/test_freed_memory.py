"""What a process does with memory that it has freed; in processes of their own."""

import ctypes
import subprocess
import sys

import pytest

# How many pages the system had to find for twelve tensors, again and again: the median round, as
# one that lays them otherwise still grows the heap. Without being told, glibc asks for 21,281 in a
# thread; outside of one it depends on what else lies in memory.
_PAGES = """
import resource, statistics, threading, torch
from embedjob.encoder.batching.transfers import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        states = [torch.empty((i % 5 + 1) << 18).fill_(1.0) for i in range(12)]
        del states
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def found():
    print(statistics.median_low([pages() for _ in range(7)]))

assert keep_freed_memory()
if {thread}:
    thread = threading.Thread(target=found)
    thread.start()
    thread.join()
else:
    found()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is no glibc")
@pytest.mark.parametrize("thread", [True, False])
def test_memory_that_is_kept_is_not_asked_for_again(thread: bool) -> None:
    # An actor of Ray Data computes in a thread, whose memory comes in heaps of 64 MB.
    command = [sys.executable, "-c", _PAGES.format(thread=thread)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1_000
