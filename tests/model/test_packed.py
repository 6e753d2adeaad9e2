"""Softmax attention of packed documents one by one is that of all tokens under a mask."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import t2r.model.modeling_t2r
import t2r.model.packed
from tests.model.tiny import sliding_teacher, student, tokens


def varlen(q, k, v, bounds, _, longest, *args, window_size=(-1, -1), **kwargs):
    """Stands in for torch's, which needs a GPU."""
    assert bounds.dtype == torch.int32
    assert (bounds.diff() <= longest).all()
    outputs = []
    for start, end in pairwise(bounds.tolist()):
        ahead = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (ahead >= 0) & (ahead <= window_size[0] if window_size[0] >= 0 else True)
        parts = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outputs)


LAYERS = ["linear_attention", "sliding_attention", "full_attention"]
PACKED = {"cu_seqlens": torch.tensor([0, 13, 14, 60]), "max_seqlen": 46}


@torch.no_grad()
@pytest.mark.parametrize("softmax", [False, True])
def test_by_document_is_under_a_mask(softmax, monkeypatch):
    model = student(sliding_teacher(window=12), layer_types=LAYERS, sliding_window=12)
    x, calls = tokens(1, 60), []

    def logits():
        if not softmax:
            return model(x, **PACKED).logits
        with model.softmax_attention():
            return model(x, **PACKED).logits

    expected = logits()
    monkeypatch.setattr(t2r.model.packed, "varlen_attn", lambda *a, **k: calls.append(1) or varlen(*a, **k))
    monkeypatch.setattr(t2r.model.modeling_t2r, "attends_by_document", lambda x, p, c: p.cu_seqlens is not None)
    assert (logits() - expected).abs().max() < 1e-4
    assert len(calls) == (3 if softmax else 2)


@pytest.mark.gpu
@torch.no_grad()
def test_by_document_on_a_gpu():
    model = student(sliding_teacher(window=12), layer_types=LAYERS, sliding_window=12).cuda().bfloat16()
    x = tokens(1, 60).cuda()
    packed = model(x, cu_seqlens=PACKED["cu_seqlens"].cuda(), max_seqlen=46).logits
    alone = torch.cat([model(part).logits for part in x.split([13, 1, 46], 1)], 1)
    assert (packed - alone).float().norm() / alone.float().norm() < 0.02


def test_on_a_cpu_it_is_not_used():
    model = student(layer_types=LAYERS, sliding_window=12)
    positions = t2r.model.modeling_t2r.Positions.resolve(torch.zeros(1, 60, 1), None, None, PACKED["cu_seqlens"], 0)
    assert not t2r.model.packed.attends_by_document(torch.zeros(1), positions, model.config)
