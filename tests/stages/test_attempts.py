"""The watch on an attempt, in a process of its own that it may end."""

import subprocess
import sys
import time

HANGS = """
import ctypes, time
from embedjob.stages.attempts import limited
with limited(3.0):
    pass
with limited(3.0) as moved:
    for _ in range(5):
        time.sleep(1.0)
        moved()
print("alive", flush=True)
with limited(3.0):
    # Unlike time.sleep it keeps the interpreter's lock, as a loop in a library may.
    ctypes.PyDLL(None).sleep(100)
print("never", flush=True)
"""


def test_what_hangs_is_ended_with_its_stack_and_what_gets_on_is_not() -> None:
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=90, check=False
    )
    assert ended.stdout == "alive\n", ended.stderr
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert 'File "<string>", line 13' in ended.stderr
    assert time.monotonic() - started < 80
