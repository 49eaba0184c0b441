"""`wavepath prepare` holds a bounded part of a slide, whatever its size: the resident memory of the real command, its children included."""

import contextlib
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from wavepath.data.phantom import make_phantoms

# The command with a smaller cache of decoded tiles (192 MB by default), which otherwise is what fills up as slides grow.
COMMAND = "import sys; from wavepath.data import prepare; prepare._CACHE_MB = 16; from wavepath.cli import main; sys.exit(main(sys.argv[1:]))"


def peak_memory(argv: list[str]) -> int:
    """Bytes: the largest sum of resident memory over a process and its children, sampled every 10 ms."""
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen([sys.executable, "-c", COMMAND, *argv], stderr=said)
        root, peak = psutil.Process(child.pid), 0
        while child.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max(peak, sum(process.memory_info().rss for process in (root, *root.children(recursive=True))))
            time.sleep(0.01)
        said.seek(0)
        assert child.returncode == 0, said.read()
    return peak


@pytest.mark.slow
def test_memory_does_not_grow_with_the_slide(tmp_path):
    peaks = {}
    for side in (2048, 8192):
        make_phantoms(tmp_path / str(side), 1, 0, size=side, progress=False)
        # All regions, so that most of the slide is read; the smallest of two, since one run may meet a late garbage collection.
        runs = [[f"--slides={tmp_path / str(side)}", f"--out={tmp_path / f'out {side} {run}'}", "--select=all"] for run in range(2)]
        peaks[side] = min(peak_memory(["prepare", *argv]) for argv in runs)
    assert max(peaks.values()) < 2.5e9
    # The pixels of the larger slide take 201 MB, its overview at 2 mpp 3 MB. Measured: 37 MB more.
    assert peaks[8192] - peaks[2048] < 100e6, peaks
