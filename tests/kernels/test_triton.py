"""The Triton kernels in Triton's interpreter: fp32, small shapes. `tests/test_gpu.py` has the real sizes."""

from dataclasses import replace

import pytest
import torch

from t2r_kernels import Gate, SlotState, gsa, gsa_step, log_gate
from tests.kernels.cases import GATES, assert_near, case, double, run

pytest.importorskip("triton")

from t2r_kernels.triton import configs, launch, pieces
from t2r_kernels.triton.blocks import LOWEST

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")

TOLERANCE = 1e-5  # of the norm


@pytest.fixture(params=[16, 32])
def chunk(request, monkeypatch):
    """Results must not depend on how tokens are cut into chunks, nor on how many heads a tile has."""
    config = configs.lookup("any", 64, 64, False)
    heads = {"HEADS": 2 if request.param == 16 else 1, "num_warps": 4, "num_stages": 1}
    changed = replace(config, chunk=request.param, block_d=16, output=heads, queries=heads, tokens=heads)
    monkeypatch.setattr(launch, "config_for", lambda *args, **kwargs: changed)
    return request.param


def check(tensors, tolerance=TOLERANCE, **options):
    """Triton in fp32 against the recurrence in fp64: outputs, final state, every gradient."""
    s = options.pop("s", None)
    expected = run(gsa, double(tensors), backend="naive", s=None if s is None else double([s])[0], **options)
    actual = run(gsa, tensors, backend="triton", s=s, **options)
    assert_near(actual, expected, tolerance)


@pytest.mark.parametrize("hide_unwritten", [False, True])
@pytest.mark.parametrize("T", [1, 15, 17, 50])
def test_is_the_recurrence(T, hide_unwritten, chunk):
    check(case(T, H=1, HQ=3, dtype=torch.float32), hide_unwritten=hide_unwritten, position_offset=torch.tensor([0, 5]))


@pytest.mark.parametrize("gates", GATES)
def test_gates(gates, chunk):
    check(case(40, B=1, H=1, HQ=2, gates=gates, dtype=torch.float32))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 2)])
def test_groups_and_widths(heads, chunk):
    """Groups that a tile of two heads does not divide; widths over several tiles, and no power of two."""
    shape = {"B": 1, "HQ": heads[0], "H": heads[1], "D": 20, "Dv": 40, "M": 20}
    check(case(18, **shape, gates="mild", dtype=torch.float32))


def test_free_write_strengths(chunk):
    tensors = case(30, B=1, dtype=torch.float32)
    s = torch.randn(tensors[3].shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    check(tensors, s=s, scale=0.7)


@pytest.mark.parametrize("lengths", [[33], [1, 15, 16, 17], [5, 0, 0, 20, 0], [0, 3]])
def test_packed(lengths, chunk):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    tensors = case(sum(lengths), B=1, HQ=2, H=1, n=len(lengths), dtype=torch.float32)
    check(tensors, cu_seqlens=bounds, hide_unwritten=True, position_offset=torch.arange(len(lengths)) * 3)


@pytest.mark.parametrize("gates", ["mild", "ends"])
@pytest.mark.parametrize("hide_unwritten", [False, True])
def test_log_sum_exp(hide_unwritten, gates, chunk):
    """With a gradient of its own, in chunks of one band ("mild") and of several."""
    tensors = case(40, HQ=3, H=1, gates=gates, dtype=torch.float32)
    check(tensors, output_lse=True, hide_unwritten=hide_unwritten, position_offset=torch.tensor([0, 5]))


def test_log_sum_exp_of_packed_sequences(chunk):
    tensors = case(41, B=1, HQ=4, H=2, n=4, gates="mild", dtype=torch.float32)
    bounds = torch.tensor([0, 5, 5, 24, 41], dtype=torch.int32)
    check(tensors, output_lse=True, cu_seqlens=bounds, hide_unwritten=True, position_offset=torch.arange(4) * 3)


def test_log_sum_exp_of_nothing(chunk):
    q, k, v, g, *_ = (x.detach().requires_grad_() for x in case(20, B=1, HQ=2, H=1, dtype=torch.float32))
    options = {"hide_unwritten": True, "position_offset": -7, "backend": "triton"}
    o, _, lse = gsa(q, k, v, g, output_lse=True, **options)
    assert torch.equal(o, gsa(q, k, v, g, **options)[0])
    assert (lse[:, :7] == -torch.inf).all()
    assert lse[:, 7:].isfinite().all()
    gradients = torch.autograd.grad(lse, (q, k, v, g), torch.ones_like(lse))
    assert all(x.isfinite().all() for x in gradients)
    assert (gradients[0][:, :7] == 0).all()
    assert (gradients[0][:, 7:].abs().sum((-1, -2)) > 0).all()


def fused(T=40, normalizer=1.0, dtype=torch.float32):
    """Tensors whose fourth holds gate logits, and a window schedule of 12 slots that starts with padding."""
    tensors = case(T, B=1, HQ=2, H=1, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    tensors[3] = (3 * torch.randn(tensors[3].shape, generator=generator)).to(dtype).requires_grad_()
    slot = (torch.arange(T) % 12).to(torch.int32).masked_fill(torch.arange(T) < 3, -1)
    gate = Gate(slot[None, :, None], write_logit=7.0, keep_logit=12.0, normalizer=normalizer)
    return tensors, gate


@pytest.mark.parametrize("normalizer", [1.0, 8.0])
def test_fused_gate(normalizer, chunk):
    tensors, gate = fused(normalizer=normalizer)

    def from_logits(q, k, v, logits, **options):
        return gsa(q, k, v, log_gate(logits, gate), **options)

    expected = run(from_logits, double(tensors), backend="naive")
    assert_near(run(gsa, tensors, gate=gate, backend="triton"), expected, TOLERANCE)
    assert_near(run(gsa, tensors, gate=gate, backend="torch"), expected, 1e-4)


def test_half_precision_inputs(chunk):
    """Read as they are, computed in fp32 (tf32 on a GPU): bf16 is for real tensor cores alone."""
    tensors = case(40, B=1, HQ=2, H=1, dtype=torch.float32)
    tensors[:3] = [x.detach().half().requires_grad_() for x in tensors[:3]]
    check(tensors, tolerance=2e-3)


def test_fused_gate_keeps_small_numbers():
    """Where a slot is kept at 1 - 6e-6, that difference has to be right, not only the gate."""
    logits = torch.linspace(-40, 40, 41).view(1, 41, 1, 1)
    q, k, v = torch.zeros(1, 41, 1, 4), torch.zeros(1, 41, 1, 4), torch.ones(1, 41, 1, 4)
    gate = Gate(torch.zeros(41, 1, 1, dtype=torch.int32))
    _, state = gsa(
        *(x.transpose(0, 1) for x in (q, k, v, logits)), gate=gate, output_final_state=True, backend="triton"
    )
    expected = torch.sigmoid(-logits.flatten().double())
    assert ((state.values[:, 0, 0, 0] - expected) / expected).abs().max() < 1e-6


def test_gradients_of_written_slots_are_not_noise():
    """What a gate of e^-7 passes on is a thousandth of what it stops: sums that must cancel may not swamp it."""
    tensors, gate = fused(60)
    tensors[3] = torch.zeros_like(tensors[3]).requires_grad_()
    expected = run(gsa, double(tensors), gate=gate, backend="naive")["dg"]
    actual = run(gsa, tensors, gate=gate, backend="triton")["dg"]
    written = torch.arange(12) == gate.slot[..., None]
    assert (actual - expected)[written].norm() / expected[written].norm() < 1e-3
    kept = ~written & (gate.slot >= 0)[..., None]
    assert (actual - expected)[kept].norm() / expected[kept].norm() < 1e-4


def test_extremes_are_finite():
    q, k, v, g, *_ = (x.detach() for x in case(40, B=1, HQ=2, H=1, dtype=torch.float32))
    g[..., ::2] = 0
    g[..., 1::2] = -30
    tensors = [x.requires_grad_() for x in (q * 1e4, k, v, g)]
    o, state = gsa(*tensors, hide_unwritten=True, output_final_state=True, backend="triton")
    expected, _ = gsa(*double(tensors), hide_unwritten=True, backend="naive")
    assert_near({"o": o}, {"o": expected}, 1e-3)  # logits of 1e4 in fp32
    gradients = torch.autograd.grad(o.sum(), tensors)
    assert all(x.isfinite().all() for x in (*state, *gradients))
    zero, _ = gsa(q, k * 0, v, g * 0, hide_unwritten=True, backend="triton")
    assert (zero == 0).all()
    forget = torch.full_like(g, -torch.inf)
    last, _ = gsa(q, k, v, forget, backend="triton")
    assert_near({"o": last}, {"o": gsa(*double([q, k, v]), forget.double(), backend="naive")[0]}, TOLERANCE)


def test_strided_inputs(chunk):
    """Heads cut out of one fused projection, a transposed layout, gates with a stride in the last dimension."""
    tensors = case(20, dtype=torch.float32)
    q, k, v, g, keys, values = (x.detach() for x in tensors)
    together = torch.cat([q, k, v], 2)
    views = [together[:, :, :6], together[:, :, 6:8], together[:, :, 8:].transpose(1, 2).contiguous().transpose(1, 2)]
    views.append(g.repeat_interleave(2, -1)[..., ::2])
    assert not any(x.is_contiguous() for x in views)
    expected = run(gsa, double(tensors), backend="naive")
    views = [x.requires_grad_() for x in (*views, keys.transpose(2, 3).contiguous().transpose(2, 3), values)]
    assert_near(run(gsa, views, backend="triton"), expected, TOLERANCE)


def test_every_element_is_written(monkeypatch):
    """Buffers full of NaN: what a kernel leaves out shows."""
    options = {"backend": "triton", "hide_unwritten": True, "output_lse": True}
    expected = run(gsa, case(37, dtype=torch.float32), **options)

    def poisoned(*size, **options):
        x = torch.zeros(*size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: poisoned(x.shape, dtype=x.dtype))
    new = lambda x, *size, **options: poisoned(*size, **{"dtype": x.dtype} | options)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", new)
    actual = run(gsa, case(37, dtype=torch.float32), **options)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("start", ["log gates", "strengths", "logits"])
@pytest.mark.parametrize(("D", "M"), [(8, 12), (20, 40)])
def test_steps_are_the_whole(start, D, M):
    T, options = 20, {}
    with torch.no_grad():
        q, k, v, g, keys, values = case(T, D=D, Dv=12, M=M, dtype=torch.float32)
        if start == "strengths":
            options["s"] = torch.rand(g.shape, generator=torch.Generator().manual_seed(2))
        if start == "logits":
            slot = (torch.arange(T) % M).to(torch.int32)[None, :, None].expand(2, T, 2)
            options["gate"] = Gate(slot, 7.0, 12.0)
        offset = torch.tensor([0, 4])
        expected, final, lse = gsa(
            q, k, v, g, initial_state=(keys, values), output_final_state=True, hide_unwritten=True,
            position_offset=offset, backend="torch", output_lse=True, **options,
        )  # fmt: skip
        state, steps = SlotState(keys.clone(), values.clone()), []
        for t in range(T):
            now = slice(t, t + 1)
            here = {"s": options["s"][:, now]} if "s" in options else {}
            if "gate" in options:
                here["gate"] = options["gate"]._replace(slot=slot[:, now])
            out, returned, total = gsa_step(
                q[:, now], k[:, now], v[:, now], g[:, now], state, hide_unwritten=True, position_offset=offset + t,
                backend="triton", output_lse=True, **here,
            )  # fmt: skip
            assert returned.keys is state.keys
            steps.append((out, total))
        unseen = gsa_step(
            *(x[:, :1] for x in (q, k, v, g)), SlotState(keys, values), hide_unwritten=True, position_offset=-1,
            backend="triton", output_lse=True,
        )[2]  # fmt: skip
    outs, totals = (torch.cat(x, 1) for x in zip(*steps, strict=True))
    actual = {"o": outs, "lse": totals, "keys": state.keys, "values": state.values}
    assert_near(actual, {"o": expected, "lse": lse, "keys": final.keys, "values": final.values}, TOLERANCE)
    assert (unseen == -torch.inf).all()


def test_operators_are_well_defined():
    """Schemas, fake implementations and autograd of the operators, as PyTorch itself checks them."""
    from t2r_kernels.triton import ops

    q, k, v, g, keys, values = case(3, B=2, HQ=2, H=1, dtype=torch.float32)
    slot = torch.zeros(2, 3, 1, dtype=torch.int32)
    offsets = torch.zeros(2, dtype=torch.long)
    for s, at in ((None, None), (torch.rand(g.shape), None), (None, slot)):
        for output_lse in (False, True):
            arguments = (q, k, v, g, s, at, keys, values, None, offsets, 1.0, 1.0, 2.0, 1.0, True, output_lse)
            torch.library.opcheck(ops.gsa_op, arguments)
    token = [x[:, :1].detach() for x in (q, k, v, g)]
    state = [x.detach() for x in (keys, values)]
    for lse in (None, torch.empty(2, 1, 2)):
        torch.library.opcheck(ops.gsa_step_op, (*token, None, None, None, *state, lse, 1.0, 0.0, 0.0, 1.0))


def test_autocast_decides_what_the_tensor_cores_see():
    tensors = [x.detach() for x in case(20, B=1, HQ=2, H=1, dtype=torch.float32)]
    expected, _ = gsa(*(x.half() for x in tensors[:3]), tensors[3], backend="triton")
    with torch.autocast("cpu", torch.float16):
        actual, state = gsa(*tensors[:4], output_final_state=True, backend="triton")
    assert actual.dtype == torch.float16
    assert state.keys.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_compiles_without_graph_breaks():
    """Dynamo's and autograd's part; what runs is the interpreter. `test_triton_gpu.py` compiles for the device."""
    tensors, gate = fused(10)
    options = {"gate": gate, "hide_unwritten": True, "backend": "triton"}

    def layer(q, k, v, logits, **rest):
        with torch.autocast("cpu", torch.float16, enabled=False):
            o, state, *lse = gsa(q.sin(), k, v, logits * 2, **options, **rest)
        return o.cos(), state, *lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for more in ({}, {"output_lse": True}):
        assert_near(run(compiled, tensors, **more), run(layer, tensors, **more), TOLERANCE)

    def token(q, k, v, logits, keys, values):
        now = gate._replace(slot=gate.slot[:, :1])
        options = {"gate": now, "backend": "triton"}
        o, _, lse = gsa_step(q.sin(), k, v, logits, (keys, values), output_lse=True, **options)
        return o.cos() + gsa_step(q, k, v, logits, (keys, values), **options)[0], lse

    first = [x.detach()[:, :1] for x in tensors[:4]]
    states = [[x.detach().clone() for x in tensors[4:]] for _ in range(2)]
    actual = torch.compile(token, fullgraph=True, backend="aot_eager")(*first, *states[0])
    expected = token(*first, *states[1])
    assert_near(dict(enumerate(actual)), dict(enumerate(expected)), TOLERANCE)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_checkpointed_is_plain():
    from torch.utils.checkpoint import checkpoint

    def checkpointed(*tensors, **options):
        return checkpoint(lambda *x: gsa(*x, **options), *tensors, use_reentrant=False)

    expected = run(gsa, case(20, dtype=torch.float32), backend="triton")
    actual = run(checkpointed, case(20, dtype=torch.float32), backend="triton")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_what_triton_does_not_take_is_named():
    q, k, v, g, *_ = (x.detach() for x in case(5))
    with pytest.raises(ValueError, match="does not take fp64"):
        gsa(q, k, v, g, backend="triton")
    wide = torch.zeros(1, 3, 1, 300)
    with pytest.raises(ValueError, match="wider than 256"):
        gsa(wide, wide, wide, wide[..., :4], backend="triton")
    with pytest.raises(ValueError, match=r"gate.slot must be int32 of shape \[2, 5, 2\]"):
        gsa(q, k, v, g, gate=Gate(torch.zeros(2, 5, 2)))
    with pytest.raises(ValueError, match="give either gate or s"):
        gsa(q, k, v, g, s=g, gate=Gate(torch.zeros(2, 5, 2, dtype=torch.int32)))


@pytest.fixture
def few_at_once(monkeypatch):
    """12 slots are three pieces of four."""
    monkeypatch.setattr(pieces, "MOST_SLOTS", 5)


@pytest.mark.parametrize("gates", ["mild", "ends"])
@pytest.mark.parametrize("hide_unwritten", [False, True])
def test_pieces_are_the_whole(hide_unwritten, gates, chunk, few_at_once):
    tensors = case(40, HQ=3, H=1, gates=gates, dtype=torch.float32)
    check(tensors, output_lse=True, hide_unwritten=hide_unwritten, position_offset=torch.tensor([0, 5]))


def test_pieces_of_packed_sequences(chunk, few_at_once):
    tensors = case(41, B=1, HQ=4, H=2, n=4, gates="mild", dtype=torch.float32)
    bounds = torch.tensor([0, 5, 5, 24, 41], dtype=torch.int32)
    check(tensors, cu_seqlens=bounds, hide_unwritten=True, position_offset=torch.arange(4) * 3)


def test_pieces_with_free_write_strengths(chunk, few_at_once):
    tensors = case(30, B=1, dtype=torch.float32)
    s = torch.randn(tensors[3].shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    check(tensors, s=s)


def test_pieces_of_a_fused_gate(chunk, few_at_once):
    """Padding before the first token too, which all pieces leave as they are and none reads."""
    tensors, gate = fused()
    options = {"gate": gate, "hide_unwritten": True, "position_offset": -3}
    check(tensors, **options)
    whole = gsa(*tensors[:4], **options, backend="torch", output_lse=True)
    cut = gsa(*tensors[:4], **options, backend="triton", output_lse=True)
    assert_near({"o": cut[0], "lse": cut[2][:, 3:]}, {"o": whole[0], "lse": whole[2][:, 3:]}, TOLERANCE)
    assert (cut[2][:, :3] == -torch.inf).all()


def test_more_slots_than_the_table_has():
    tensors = case(6, B=1, HQ=2, H=1, M=150, gates="mild", dtype=torch.float32)
    check(tensors)
    q, k, v, g, *_ = (x.detach() for x in tensors)
    states = [SlotState(torch.ones(1, 1, 150, k.shape[3]), torch.ones(1, 1, 150, v.shape[3])) for _ in range(2)]
    outputs = [
        gsa_step(*(x[:, :1] for x in (q, k, v, g)), state, backend=backend)[0]
        for state, backend in zip(states, ("triton", "torch"), strict=True)
    ]
    assert_near({"o": outputs[0], "k": states[0].keys}, {"o": outputs[1], "k": states[1].keys}, TOLERANCE)


def test_gates_are_cut_off_where_nothing_is_left():
    assert torch.tensor(LOWEST.value).exp() < 1e-17
