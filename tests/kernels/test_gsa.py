import logging
from itertools import pairwise

import pytest
import torch

import t2r_kernels.api
import t2r_kernels.chunk
from t2r_kernels import SlotState, gsa, gsa_step, zero_state
from tests.kernels.cases import GATES, assert_close, case, run

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 200]


@pytest.fixture(params=["one group", "many groups"], autouse=True)
def group_bytes(request, monkeypatch):
    """The chunked backend handles its chunks in groups; results must not depend on how many there are."""
    if request.param == "many groups":
        monkeypatch.setattr(t2r_kernels.chunk, "GROUP_BYTES", 1)


@pytest.mark.parametrize("hide_unwritten", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_is_the_recurrence(T, dtype, hide_unwritten):
    tensors = case(T, dtype=dtype)
    expected = run(gsa, tensors, backend="naive", hide_unwritten=hide_unwritten)
    actual = run(gsa, tensors, backend="torch", hide_unwritten=hide_unwritten)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 4), (8, 2)])
def test_gates_and_groups(gates, heads, dtype):
    tensors = case(50, HQ=heads[0], H=heads[1], Dv=5, gates=gates, dtype=dtype)
    assert_close(run(gsa, tensors, backend="torch"), run(gsa, tensors, backend="naive"), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_free_write_strengths(dtype):
    tensors = case(40, dtype=dtype)
    s = torch.randn(tensors[3].shape, generator=torch.Generator().manual_seed(2), dtype=dtype).requires_grad_()
    options = {"s": s, "scale": 0.7}
    expected = run(gsa, tensors, backend="naive", **options)
    assert_close(run(gsa, tensors, backend="torch", **options), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("hide_unwritten", [False, True])
@pytest.mark.parametrize("lengths", [[33], [1, 15, 16, 17, 40], [5, 0, 0, 20, 0], [1] * 7])
def test_packed_is_each_sequence_alone(lengths, hide_unwritten, backend):
    offsets = torch.arange(len(lengths)) * 3
    tensors = case(sum(lengths), B=1, n=len(lengths))
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = run(
        gsa,
        tensors,
        cu_seqlens=torch.tensor(bounds),
        backend=backend,
        hide_unwritten=hide_unwritten,
        position_offset=offsets,
    )

    def alone(q, k, v, g, *, initial_state, s=None, output_final_state):
        outputs, states = [], []
        for n, length in enumerate(lengths):
            part = slice(bounds[n], bounds[n] + length)
            state = SlotState(*(x[n : n + 1] for x in initial_state))
            o, final = gsa(
                *(x[:, part] for x in (q, k, v, g)),
                s=s,
                initial_state=state,
                output_final_state=output_final_state,
                hide_unwritten=hide_unwritten,
                position_offset=int(offsets[n]),
                backend="naive",
            )
            outputs.append(o)
            states.append(final)
        return torch.cat(outputs, 1), SlotState(*(torch.cat(x) for x in zip(*states, strict=True)))

    assert_close(packed, run(alone, tensors), 1e-9)


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("split", [1, 15, 16, 40])
def test_split_in_two_is_whole(backend, split):
    tensors = case(41)
    whole = run(gsa, tensors, backend=backend, hide_unwritten=True)

    def halves(q, k, v, g, *, initial_state, s=None, output_final_state):
        o1, state = gsa(
            *(x[:, :split] for x in (q, k, v, g)),
            initial_state=initial_state,
            output_final_state=True,
            hide_unwritten=True,
            backend=backend,
        )
        o2, state = gsa(
            *(x[:, split:] for x in (q, k, v, g)),
            initial_state=state,
            output_final_state=output_final_state,
            hide_unwritten=True,
            position_offset=split,
            backend=backend,
        )
        return torch.cat([o1, o2], 1), state

    assert_close(run(halves, tensors), whole, 1e-9)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("hide_unwritten", [False, True])
def test_step_by_step_is_whole(hide_unwritten, dtype):
    with torch.no_grad():
        q, k, v, g, keys, values = case(30, dtype=dtype)
        offset = torch.tensor([0, 4])
        state = SlotState(keys.clone(), values.clone())
        o, final, lse = gsa(
            q, k, v, g,
            initial_state=(keys, values), output_final_state=True, output_lse=True,
            hide_unwritten=hide_unwritten, position_offset=offset, backend="torch",
        )  # fmt: skip
        steps = []
        for t in range(30):
            now = (x[:, t : t + 1] for x in (q, k, v, g))
            out, returned, total = gsa_step(
                *now, state, hide_unwritten=hide_unwritten, position_offset=offset + t, output_lse=True
            )
            assert returned.keys is state.keys
            assert returned.values is state.values
            steps.append((out, total))
    outs, totals = (torch.cat(x, 1) for x in zip(*steps, strict=True))
    actual = {"o": outs, "lse": totals, "keys": state.keys, "values": state.values}
    assert_close(actual, {"o": o, "lse": lse, "keys": final.keys, "values": final.values}, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_left_padding_is_no_padding(backend):
    q, k, v, g, *_ = (x.detach() for x in case(25))
    expected, state = gsa(q, k, v, g, hide_unwritten=True, output_final_state=True, backend=backend)
    pad = [torch.nn.functional.pad(x, (0, 0, 0, 0, 7, 0), value=3.0) for x in (q, k, v)]
    kept = torch.nn.functional.pad(g, (0, 0, 0, 0, 7, 0))  # log gate 0: keep everything, write nothing
    o, padded = gsa(*pad, kept, hide_unwritten=True, position_offset=-7, output_final_state=True, backend=backend)
    assert o.isfinite().all()
    assert_close({"o": o[:, 7:], "k": padded.keys}, {"o": expected, "k": state.keys}, 1e-12)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_large_logits_and_empty_slots_stay_finite(backend):
    q, k, v, g, *_ = (x.detach().float() for x in case(40, gates="ends"))
    o, state = gsa(q * 1e4, k, v, g, hide_unwritten=True, output_final_state=True, backend=backend)
    assert o.isfinite().all()
    assert all(x.isfinite().all() for x in state)
    zero, _ = gsa(q, k * 0, v, g * 0, hide_unwritten=True, backend=backend)
    assert (zero == 0).all()


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_gradient_is_the_derivative(backend):
    tensors = case(18, B=1, HQ=2, H=1, D=2, Dv=2, M=3, gates="mild")

    def f(q, k, v, g, keys, values):
        o, state, lse = gsa(
            q, k, v, g, initial_state=(keys, values), output_final_state=True, hide_unwritten=True, backend=backend,
            output_lse=True,
        )  # fmt: skip
        return o, *state, lse

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("hide_unwritten", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 16, 50])
def test_log_sum_exp(T, dtype, hide_unwritten):
    tensors, options = case(T, dtype=dtype), {"hide_unwritten": hide_unwritten, "output_lse": True}
    expected = run(gsa, tensors, backend="naive", **options)
    assert_close(run(gsa, tensors, backend="torch", **options), expected, TOLERANCE[dtype])
    assert expected["lse"].dtype == dtype
    last = expected["keys"].repeat_interleave(3, 1) @ tensors[0][:, -1, :, :, None] * 8**-0.5  # [B, HQ, M, 1]
    seen = slice(T if hide_unwritten else None)
    assert_close({"": expected["lse"][:, -1]}, {"": last[:, :, seen, 0].logsumexp(-1)}, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_log_sum_exp_of_packed_sequences(backend):
    lengths, offsets = [5, 0, 17, 11], torch.tensor([0, 2, 4, 6])
    tensors, options = case(33, B=1, n=4), {"hide_unwritten": True, "output_lse": True, "backend": backend}
    q, k, v, g, keys, values = tensors
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    _, _, packed = gsa(q, k, v, g, initial_state=(keys, values), cu_seqlens=bounds, position_offset=offsets, **options)
    alone = [
        gsa(*(x[:, start:end] for x in (q, k, v, g)), initial_state=(keys[n : n + 1], values[n : n + 1]),
            position_offset=int(offsets[n]), **options)[2]
        for n, (start, end) in enumerate(pairwise(bounds.tolist()))
    ]  # fmt: skip
    assert_close({"lse": packed}, {"lse": torch.cat(alone, 1)}, 1e-9)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_two_halves_of_the_slots_joined_are_all_slots(backend):
    tensors = case(40, M=12)

    def joined(q, k, v, g, *, initial_state, s=None, output_final_state):
        halves = [
            gsa(q, k, v, g[..., half], initial_state=[x[:, :, half] for x in initial_state], output_lse=True,
                output_final_state=output_final_state, backend=backend)
            for half in (slice(5), slice(5, None))
        ]  # fmt: skip
        (o1, state1, lse1), (o2, state2, lse2) = halves
        share = (lse1 - torch.logaddexp(lse1, lse2)).exp()[..., None]
        state = SlotState(*(torch.cat(x, 2) for x in zip(state1, state2, strict=True)))
        return share * o1 + (1 - share) * o2, state

    assert_close(run(joined, tensors), run(gsa, tensors, backend="naive"), 1e-9)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_log_sum_exp_of_nothing(backend):
    q, k, v, g, *_ = case(20)
    options = {"hide_unwritten": True, "position_offset": torch.tensor([-7, 0]), "backend": backend}
    o, _, lse = gsa(q, k, v, g, output_lse=True, **options)
    assert torch.equal(o, gsa(q, k, v, g, **options)[0])
    assert (lse[0, :7] == -torch.inf).all()
    assert lse[0, 7:].isfinite().all()
    assert lse[1].isfinite().all()
    (gradient,) = torch.autograd.grad(lse, q, torch.ones_like(lse))
    assert (gradient[0, :7] == 0).all()
    assert (gradient[0, 7:].abs().sum((-1, -2)) > 0).all()
    unseen = gsa_step(
        *(x.detach()[:, :1] for x in (q, k, v, g)), zero_state(2, k, v, 12, k.dtype), output_lse=True,
        hide_unwritten=True, position_offset=options["position_offset"],
    )[2]  # fmt: skip
    assert_close({"": unseen[1]}, {"": lse[1, :1]}, 1e-9)
    assert (unseen[0] == -torch.inf).all()


def test_low_precision_inputs_keep_an_fp32_state():
    q, k, v, g, *_ = (x.detach() for x in case(40))
    o, state = gsa(q.bfloat16(), k.bfloat16(), v.bfloat16(), g.float(), output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert state.keys.dtype == torch.float32
    reference, _ = gsa(*(x.bfloat16().double() for x in (q, k, v)), g.float().double(), backend="naive")
    assert_close({"o": o.float()}, {"o": reference.float()}, 1e-2)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_autocast_leaves_the_recurrence_in_fp32(backend):
    tensors = [x.detach().float().requires_grad_() for x in case(40)]
    expected = run(gsa, tensors, backend=backend)

    def under_autocast(*args, **options):  # as in training: forward under it, backward not
        with torch.autocast("cpu", torch.bfloat16):
            return gsa(*args, **options)

    actual = run(under_autocast, tensors, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, g, keys, values = (x.detach().clone() for x in tensors)
        stepped, _ = gsa_step(q[:, :1], k[:, :1], v[:, :1], g[:, :1], (keys, values))
    assert_close(actual, expected, 1e-6)
    assert_close({"o": stepped}, {"o": expected["o"][:, :1]}, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 9, 5, 8)}, "do not divide"),
        ({"v": (2, 8, 2, 8)}, "share batch and time"),
        ({"g": (2, 9, 3, 12)}, "share heads"),
        ({"k": (2, 9, 2, 7)}, "width"),
        ({"q": (2, 9, 8)}, "batch, time, heads, width"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {"q": (2, 9, 4, 8), "k": (2, 9, 2, 8), "v": (2, 9, 2, 8), "g": (2, 9, 2, 12)} | change
    with pytest.raises(ValueError, match=message):
        gsa(*(torch.zeros(s) for s in shapes.values()))


def test_wrong_options_are_named():
    q, k, v, g, keys, values = (x.detach() for x in case(9))
    with pytest.raises(ValueError, match="'fast' is unknown; choose one of auto, naive, torch"):
        gsa(q, k, v, g, backend="fast")
    with pytest.raises(ValueError, match="batch size 1"):
        gsa(q, k, v, g, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="from 0 to 9"):
        gsa(q[:1], k[:1], v[:1], g[:1], cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="slot keys must have shape"):
        gsa(q, k, v, g, initial_state=(keys[:1], values[:1]))
    with pytest.raises(ValueError, match="s must have"):
        gsa(q, k, v, g, s=g[:, :, :, :1])
    with pytest.raises(ValueError, match="one token"):
        gsa_step(q, k, v, g, (keys, values))
    first = [x[:, :1] for x in (q, k, v, g)]
    with pytest.raises(ValueError, match="in place"):
        gsa_step(*first, (keys.float(), values.float()))
    with pytest.raises(ValueError, match="position"):
        gsa_step(*first, (keys, values), hide_unwritten=True)


def test_auto_says_once_what_it_takes(caplog):
    t2r_kernels.api._say_once.cache_clear()
    q, k, v, g, *_ = (x.detach() for x in case(3))
    with caplog.at_level(logging.INFO, logger="t2r_kernels.api"):
        gsa(q, k, v, g)
        gsa(q, k, v, g)
    assert [r.message for r in caplog.records] == ["gsa: backend 'torch' on cpu"]
