"""The kernels compile for GPUs that are not here: Ampere by construction, within its shared memory."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_kernels_fit_into_the_smallest_gpus(tmp_path):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    words = ["--architecture", "any", "--width", "128", "--num-slots", "64"]
    command = [sys.executable, "-m", "benchmarks.build_kernels", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("KiB") == 22  # eight kernels, three of them for one band and for several, bf16 and fp32
