"""Beside flash-linear-attention itself, on a GPU: `pip install flash-linear-attention`, `pytest -m gpu`."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_both_ways_the_logits_are_the_same(tmp_path, dtype, limit):
    pytest.importorskip("fla")
    from benchmarks.checkpoints import fla_roundtrip

    errors = fla_roundtrip(tmp_path, dtype)
    assert {"in/64", "in/500", "out/64", "out/500"} < set(errors)
    assert max(mean for mean, _ in errors.values()) < limit
    assert max(largest for _, largest in errors.values()) < 10 * limit
