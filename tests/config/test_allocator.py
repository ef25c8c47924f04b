"""What large requests took goes back to the system."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Large blocks with small ones between them that stay; the second time they would come from the heap.
PROGRAM = """
import os
from config.allocator import give_back_what_is_large

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if {tamed}:
    give_back_what_is_large()
stay = []
before = resident()
for _ in range(3):
    large = []
    for n in range(400):
        large.append(bytearray(b"x") * 300_000)
        stay.append(bytearray(2_000))
    del large
print(resident() - before)
"""


def left_over(*, tamed: bool) -> int:
    """Bytes that a process still has after 400 blocks of 300 kB came and went three times."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(tamed=tamed)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_large_blocks_leave_no_memory_behind() -> None:
    tamed = left_over(tamed=True)
    assert tamed < 20_000_000
    assert tamed < left_over(tamed=False) / 3
