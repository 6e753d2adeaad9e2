"""Beside flash-linear-attention itself, on a GPU: `pip install flash-linear-attention`, `pytest -m gpu`."""

from importlib.util import find_spec

import pytest
import torch

# Looked for, not imported: its kernels must not be defined before they are left untuned.
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention")]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_both_ways_the_logits_are_the_same(tmp_path, dtype, limit):
    from benchmarks.checkpoints import fla_roundtrip

    errors = fla_roundtrip(tmp_path, dtype)
    assert {"in/64", "in/500", "out/64", "out/500"} < set(errors)
    assert max(mean for mean, _ in errors.values()) < limit
    assert max(largest for _, largest in errors.values()) < 10 * limit
