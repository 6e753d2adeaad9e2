"""Memory of the chunked backend, measured in a process of its own."""

import subprocess
import sys

import pytest

# VmHWM, not ru_maxrss: a child inherits the latter, so it would begin at pytest's own peak.
PROGRAM = """
import sys, torch
from pathlib import Path
from t2r_kernels import gsa

def peak_mib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def run(T):
    q, k, v = (torch.randn(1, T, h, 64, requires_grad=True) for h in (9, 3, 3))
    g = (-torch.rand(1, T, 3, 64)).requires_grad_()
    o, _ = gsa(q, k, v, g, backend="torch")
    o.sum().backward()

run(64)
before = peak_mib()
run(int(sys.argv[1]))
print(peak_mib() - before)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def peak_mib(tokens: int) -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tokens)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_8192_tokens_forward_and_backward_stay_within_2_gib():
    assert peak_mib(8192) < 2048


def test_memory_grows_with_the_tensors_only():
    # 24,576 more tokens of q, k, v, g, o, their gradients and copies laid out in chunks were 917 MiB when measured;
    # the [C, C, M] weights of these tokens would be another 4.5 GiB at the least.
    assert peak_mib(32768) - peak_mib(8192) < 1280
