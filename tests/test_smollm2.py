"""A real Llama, SmolLM2-135M-Instruct: what `make test` brings to `.cache`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t2r.evaluation import cut_windows, generate_stream, load_model, load_tokenizer, window_nlls

GGUF = Path(__file__).parent.parent / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LIMIT_MIB = 1536

# Peak beyond what the interpreter takes with the libraries imported.
CONVERT = """
import sys
from pathlib import Path
import torch, transformers

def peak_mib():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024

import t2r_conversion
before = peak_mib()
t2r_conversion.convert(sys.argv[1], sys.argv[2], start="window", gate_write=30, gate_keep=30)
print(f"peak {peak_mib() - before:.0f} MiB")
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The model with exact gates, and what its conversion printed."""
    if not GGUF.is_file():
        pytest.fail(f"{GGUF} is missing; `make test` downloads it")
    out = tmp_path_factory.mktemp("smollm2") / "converted"
    command = [sys.executable, "-c", CONVERT, str(GGUF), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return out, done.stdout


@pytest.fixture(scope="module")
def student(converted):
    return load_model(converted[0])


@pytest.fixture(scope="module")
def teacher():
    return load_model(GGUF)


@pytest.fixture(scope="module")
def windows(converted):
    text = (Path(__file__).parent.parent / "LICENSE").read_text(encoding="utf-8")
    return cut_windows(load_tokenizer(converted[0]), text, window=200, limit=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_conversion_fits_a_laptop(converted):
    assert int(re.search(r"peak (\d+) MiB", converted[1]).group(1)) < LIMIT_MIB


@torch.no_grad()
def test_the_teacher_itself_on_short_contexts(student, teacher, windows):
    x = windows[:, :64]
    assert (student(x).logits - teacher(x).logits).abs().max() <= 1e-3


@torch.no_grad()
def test_masked_softmax_attention_on_longer_ones(student, teacher, windows):
    query, key = torch.arange(200)[:, None], torch.arange(200)
    seen = (key <= query) & ((key < 4) | (key > query - 60))
    mask = torch.where(seen, 0.0, float("-inf"))[None, None].expand(len(windows), 1, 200, 200)
    expected = teacher(windows, attention_mask=mask).logits
    assert (student(windows).logits - expected).abs().max() <= 1e-3
    assert (expected - teacher(windows).logits).abs().max() > 1  # the mask does matter


@torch.no_grad()
def test_its_own_frozen_weights_are_the_teacher(student, teacher, windows):
    with student.softmax_attention():
        assert torch.equal(window_nlls(student, windows), window_nlls(teacher, windows))


def test_it_talks(student, converted):
    tokenizer, pieces = load_tokenizer(converted[0]), []
    question = "What is the capital of France?"
    stats = generate_stream(student, tokenizer, question, max_new_tokens=12, chat=True, on_text=pieces.append)
    assert "Paris" in "".join(pieces)
    assert stats.state_bytes == 30 * 3 * 64 * 2 * 64 * 4
