"""What Gated Slot Attention is measured beside: softmax attention as PyTorch has it, and flash-linear-attention."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def softmax_attention(backend: SDPBackend) -> Callable:
    """Causal softmax attention, by one of PyTorch's backends."""

    def run(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
            )
        return o.transpose(1, 2)

    return run


def flash_linear_attention(recurrent: bool = False) -> Callable | None:
    """flash-linear-attention's operator, if installed; its gates and strengths are computed beforehand."""
    if find_spec("fla") is None:
        return None
    from fla.ops.gsa import chunk_gsa, fused_recurrent_gsa

    gates: dict[int, tuple[Tensor, Tensor]] = {}

    def run(q, k, v, logits, _, state=None):
        if id(logits) not in gates:
            g = F.logsigmoid(logits.detach().float()).to(logits.dtype)
            gates[id(logits)] = (g, (1 - g.float().exp()).to(logits.dtype))
        g, s = (x.requires_grad_(logits.requires_grad) for x in gates[id(logits)])
        if recurrent:
            keys, values = state
            return fused_recurrent_gsa(q, k, v, s, g, initial_state=(keys.mT, values), output_final_state=True)
        return chunk_gsa(q, k, v, s, g)[0]

    return run


def compile_flash_linear_attention(parts: int) -> None:
    """Fill Triton's cache with the candidates that flash-linear-attention tunes itself with.

    It would compile hundreds of them one after another; here each of `parts` processes compiles its share.
    """
    command = [sys.executable, "-m", "benchmarks.peers"]
    started = [subprocess.Popen([*command, str(i), str(parts)], stderr=subprocess.DEVNULL) for i in range(parts)]
    for process in started:
        process.wait()


def _compile_share(part: int, parts: int) -> None:
    from triton.runtime.autotuner import Autotuner

    from benchmarks.operator import MISTRAL, inputs

    every = Autotuner.prune_configs
    Autotuner.prune_configs = lambda self, kwargs: every(self, kwargs)[part::parts] or self.configs[:1]
    for B, T in ((8, 2048), (1, 16384)):
        x = inputs(MISTRAL, B, T)
        flash_linear_attention()(*x).sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _compile_share(*map(int, sys.argv[1:]))
