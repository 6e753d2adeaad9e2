"""Seeded inputs for the operator."""

import torch

from t2r_kernels import SlotState

GATES = {
    "mild": lambda x: -x,
    "ends": lambda x: torch.where(x < 0.3, -30.0 * x, torch.where(x < 0.7, -1e-6 * x, torch.zeros_like(x))),
    "overwrite": lambda x: -30 + x * 1e-3,
    "keep": lambda x: x * 0,
}


def case(T=33, B=2, HQ=6, H=2, D=8, Dv=8, M=12, dtype=torch.float64, gates="ends", n=None, seed=0):
    """q, k, v, g and an initial state for `n` sequences (B when not given), all wanting gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    n = B if n is None else n
    q, k, v = normal(B, T, HQ, D), normal(B, T, H, D), normal(B, T, H, Dv)
    g = GATES[gates](torch.rand(B, T, H, M, generator=generator, dtype=dtype))
    tensors = [q, k, v, g, normal(n, H, M, D), normal(n, H, M, Dv)]
    return [x.detach().requires_grad_() for x in tensors]


def run(gsa, tensors, *, s=None, **options):
    """Output, final state (and lse) and the gradients of every input under a fixed random cotangent, by name."""
    q, k, v, g, keys, values = tensors
    o, state, *lse = gsa(q, k, v, g, s=s, initial_state=SlotState(keys, values), output_final_state=True, **options)
    results = {"o": o, "keys": state.keys, "values": state.values} | ({"lse": lse[0]} if lse else {})
    generator = torch.Generator().manual_seed(1)
    cotangents = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results.values())
    loss = sum((x * cotangent).sum() for x, cotangent in zip(results.values(), cotangents, strict=True))
    inputs = dict(zip(["q", "k", "v", "g", "k0", "v0"], tensors, strict=True)) | ({} if s is None else {"s": s})
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    return results | {f"d{name}": x for name, x in zip(inputs, gradients, strict=True)}


def assert_close(actual, expected, tolerance):
    """Every named tensor within `tolerance`: absolute in fp64, in fp32 relative to the largest expected number.

    A gradient that cancels to nothing has terms of order 1, hence the floor.
    """
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        scale = 1.0 if want.dtype == torch.float64 else max(want.abs().max().item(), 0.1)
        error = (actual[name].to(want.dtype) - want).abs().max().item() if want.numel() else 0.0
        assert error <= tolerance * scale, f"{name}: error {error:.3g}, scale {scale:.3g}"


def double(tensors):
    """Copies in fp64, wanting gradients."""
    return [x.detach().double().requires_grad_() for x in tensors]


def assert_near(actual, expected, tolerance, terms=1e-2):
    """Every named tensor within `tolerance` of the expected one's norm.

    Where what is expected is less than a millionth an element (a gradient that cancels), within `tolerance` of
    terms of that size an element.
    """
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        floor = terms * want.numel() ** 0.5 if want.norm() < 1e-6 * want.numel() ** 0.5 else want.norm().item()
        error = (actual[name].to(want) - want).norm().item() / max(floor, 1e-30)
        assert error <= tolerance, f"{name}: error {error:.3g} of the norm"
