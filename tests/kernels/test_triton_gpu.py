"""The Triton kernels on a GPU: every width and number of slots, against the recurrence and another library's."""

import pytest
import torch

from t2r_kernels import Gate, SlotState, gsa, gsa_step, log_gate
from tests.kernels.cases import GATES, assert_near, case, double, run

pytestmark = pytest.mark.gpu

# Bounds on ‖a − b‖ / ‖b‖ for outputs and states, and for gradients.
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1e-2, 2e-2)}


def on_gpu(tensors, dtype=torch.float32):
    """q, k and v in `dtype`, gates and state in fp32, wanting gradients."""
    moved = [x.detach().to("cuda", dtype if i < 3 else torch.float32) for i, x in enumerate(tensors)]
    return [x.requires_grad_() for x in moved]


def check(tensors, **options):
    """Against the recurrence in fp64 on the same (rounded) inputs."""
    s = options.pop("s", None)
    expected = run(gsa, double(tensors), backend="naive", s=None if s is None else double([s])[0], **options)
    actual = run(gsa, tensors, backend="triton", s=s, **options)
    outputs, gradients = BOUNDS[tensors[0].dtype]
    forward = {"o", "keys", "values", "lse"} & expected.keys()
    terms = 0.1 if tensors[0].dtype == torch.float32 else 1.0
    assert_near({n: actual[n] for n in forward}, {n: expected[n] for n in forward}, outputs)
    assert_near(
        *({n: x for n, x in results.items() if n not in forward} for results in (actual, expected)), gradients, terms
    )


SHAPES = [(torch.bfloat16, D, M) for D in (64, 80, 96, 128, 256) for M in (16, 32, 64, 128)]
SHAPES += [(torch.float32, D, M) for D, M in ((64, 16), (80, 64), (96, 32), (128, 128), (256, 64), (256, 128))]
SHAPES += [(torch.float16, D, M) for D, M in ((64, 64), (96, 128), (128, 32), (256, 16))]


@pytest.mark.parametrize(("dtype", "D", "M"), SHAPES)
def test_every_shape(dtype, D, M):
    check(on_gpu(case(150, B=1, HQ=4, H=1, D=D, Dv=D, M=M, gates="mild"), dtype), hide_unwritten=True)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("M", [144, 256])
def test_more_slots_than_the_table_has(M, dtype):
    tensors = on_gpu(case(300, HQ=4, H=2, D=64, Dv=64, M=M, gates="mild"), dtype)
    check(tensors, hide_unwritten=True, output_lse=dtype == torch.float32)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("heads", [(3, 1), (8, 2)])
def test_gates_and_groups(heads, gates, dtype):
    check(on_gpu(case(130, HQ=heads[0], H=heads[1], D=64, Dv=64, M=32, gates=gates), dtype))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("T", [1, 2, 31, 64, 65, 257])
def test_lengths(T, dtype):
    check(on_gpu(case(T, HQ=4, H=2, D=64, Dv=128, M=64, gates="mild"), dtype), position_offset=3, hide_unwritten=True)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("lengths", [[200], [1, 63, 64, 65, 100], [5, 0, 0, 130, 0], [1] * 40])
def test_packed(lengths, dtype):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda")
    tensors = on_gpu(case(sum(lengths), B=1, HQ=2, H=1, D=64, Dv=64, M=32, n=len(lengths), gates="mild"), dtype)
    offsets = torch.arange(len(lengths), device="cuda")
    check(tensors, cu_seqlens=bounds, hide_unwritten=True, position_offset=offsets)


def test_compiled_for_one_document_serves_several():
    for lengths in ([192], [50, 1, 141], [192]):
        tensors = on_gpu(case(192, B=1, HQ=2, H=1, D=64, Dv=64, M=32, n=len(lengths), gates="mild"), torch.bfloat16)
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda")
        check(tensors, cu_seqlens=bounds)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_free_write_strengths(dtype):
    tensors = on_gpu(case(100, HQ=4, H=2, D=64, Dv=64, M=64, gates="mild"), dtype)
    s = torch.rand(tensors[3].shape, generator=torch.Generator().manual_seed(2)).cuda().requires_grad_()
    check(tensors, s=s, scale=0.3)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("gates", ["mild", "ends"])
@pytest.mark.parametrize("D", [64, 128])
def test_log_sum_exp(D, gates, dtype):
    tensors = on_gpu(case(150, HQ=8, H=2, D=D, Dv=D, M=64, gates=gates), dtype)
    check(tensors, hide_unwritten=True, position_offset=3, output_lse=True)
    plain = run(gsa, tensors, backend="triton", hide_unwritten=True)
    with_lse = run(gsa, tensors, backend="triton", hide_unwritten=True, output_lse=True)
    assert all(torch.equal(with_lse[name], plain[name]) for name in ("o", "keys", "values"))


@pytest.mark.parametrize("dtype", BOUNDS)
def test_log_sum_exp_of_packed_sequences(dtype):
    bounds = torch.tensor([0, 5, 5, 135, 200], device="cuda")
    tensors = on_gpu(case(200, B=1, HQ=4, H=1, D=64, Dv=64, M=32, n=4, gates="mild"), dtype)
    offsets = torch.arange(4, device="cuda")
    check(tensors, cu_seqlens=bounds, hide_unwritten=True, position_offset=offsets, output_lse=True)
    q, k, v, g, *_ = tensors
    _, _, lse = gsa(q, k, v, g, cu_seqlens=bounds, hide_unwritten=True, position_offset=offsets - 2, output_lse=True)
    assert lse.isinf().any(-1)[0].nonzero().flatten().tolist() == [0, 1]  # the first document begins 2 places early


def window(T, H, M, sinks=4):
    position = torch.arange(T, device="cuda")
    slot = torch.where(position < sinks, position, sinks + (position - sinks) % (M - sinks)).int()
    return Gate(slot[None, :, None].expand(1, T, H), write_logit=7.0, keep_logit=12.0)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("normalizer", [1.0, 8.0])
def test_fused_gate(normalizer, dtype):
    gate = window(300, 2, 64)._replace(normalizer=normalizer)
    tensors = on_gpu(case(300, B=1, HQ=8, H=2, D=64, Dv=64, M=64), dtype)
    low = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # fp16 cannot hold gradients of 1e-6
    tensors[3] = (tensors[3].detach() * 0.1).to(low).requires_grad_()

    def from_logits(q, k, v, logits, **options):
        return gsa(q, k, v, log_gate(logits, gate), **options)

    expected = run(from_logits, double(tensors), backend="naive", hide_unwritten=True)
    actual = run(gsa, tensors, gate=gate, backend="triton", hide_unwritten=True)
    _, gradients = BOUNDS[dtype]
    # A gate of e^-7 passes on a thousandth of what it stops, and that difference is what its logit learns from.
    bounds = dict.fromkeys(expected, gradients) | {"dg": max(gradients, 1e-3)}
    for name, bound in bounds.items():
        assert_near({name: actual[name]}, {name: expected[name]}, bound)
    written = torch.arange(64, device="cuda") == gate.slot[..., None]
    error = (actual["dg"].double() - expected["dg"])[written].norm() / expected["dg"][written].norm()
    assert error < 2 * bounds["dg"]


def test_extremes_are_finite_and_right():
    q, k, v, g, *_ = on_gpu(case(200, B=1, HQ=2, H=1, D=64, Dv=64, M=32))
    g = torch.where(torch.arange(32, device="cuda") % 2 == 0, 0.0, -30.0).expand_as(g).contiguous()
    tensors = [x.detach().requires_grad_() for x in (q * 1e4, k, v, g)]
    o, state = gsa(*tensors, hide_unwritten=True, output_final_state=True, backend="triton")
    assert_near({"o": o}, {"o": gsa(*double(tensors), hide_unwritten=True, backend="naive")[0]}, 1e-3)
    assert all(x.isfinite().all() for x in (*state, *torch.autograd.grad(o.sum(), tensors)))
    zero, _ = gsa(q, k * 0, v, g * 0, hide_unwritten=True, backend="triton")
    assert (zero == 0).all()


def test_flash_linear_attention_agrees():
    naive = pytest.importorskip("fla.ops.gsa.naive").naive_recurrent_gsa
    q, k, v, g, keys, values = (x.detach() for x in on_gpu(case(100, HQ=4, H=4, D=64, Dv=64, M=32, gates="mild")))
    expected, (fla_keys, fla_values) = naive(
        q, k, v, -torch.expm1(g), g, initial_state=(keys.mT.contiguous(), values), output_final_state=True
    )
    o, state = gsa(q, k, v, g, initial_state=(keys, values), output_final_state=True, backend="triton")
    assert_near({"o": o, "k": state.keys.mT, "v": state.values}, {"o": expected, "k": fla_keys, "v": fla_values}, 1e-5)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("M", [32, 200])
def test_steps_are_the_whole(M, dtype):
    T, gate = 80, window(80, 2, 32)
    q, k, v, _, keys, values = (x.detach() for x in on_gpu(case(T, B=1, HQ=8, H=2, D=128, Dv=128, M=M), dtype))
    logits = torch.randn(1, T, 2, M, device="cuda", dtype=dtype)
    options = {"hide_unwritten": True}
    o, final, lse = gsa(*double([q, k, v]), log_gate(logits.double(), gate), initial_state=double([keys, values]),
                        output_final_state=True, output_lse=True, backend="naive", **options)  # fmt: skip
    state, steps = SlotState(keys.clone(), values.clone()), []
    for t in range(T):
        at = slice(t, t + 1)
        here = gate._replace(slot=gate.slot[:, at])
        now = [x[:, at] for x in (q, k, v, logits)]
        out, _, total = gsa_step(*now, state, gate=here, position_offset=t, output_lse=True, **options)
        steps.append((out, total))
    outs, totals = (torch.cat(x, 1) for x in zip(*steps, strict=True))
    assert_near({"o": outs, "lse": totals}, {"o": o, "lse": lse}, BOUNDS[dtype][0])
    assert_near(state._asdict(), final._asdict(), 1e-5)  # the state is fp32 whatever comes in


def test_results_do_not_move():
    tensors = on_gpu(case(500, HQ=8, H=2, D=128, Dv=128, M=64), torch.bfloat16)
    first = run(gsa, tensors, backend="triton", hide_unwritten=True)
    for _ in range(3):
        again = run(gsa, tensors, backend="triton", hide_unwritten=True)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_no_wait_for_the_device():
    tensors = on_gpu(case(200, B=1, HQ=2, H=1, D=64, Dv=64, M=32, n=3, gates="mild"), torch.bfloat16)
    bounds = torch.tensor([0, 70, 70, 200], device="cuda")
    run(gsa, tensors, backend="triton", cu_seqlens=bounds)  # compiled
    q, k, v, g, keys, values = tensors
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        o, state = gsa(q, k, v, g, initial_state=(keys, values), output_final_state=True, cu_seqlens=bounds)
        torch.autograd.grad((o, *state), tensors, (o, *state))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_step_in_a_cuda_graph():
    q, k, v, g, keys, values = (x.detach() for x in on_gpu(case(1, HQ=8, H=2, D=64, Dv=64, M=32), torch.bfloat16))
    position = torch.tensor([3, 9], device="cuda")
    eager, graphed = SlotState(keys.clone(), values.clone()), SlotState(keys.clone(), values.clone())

    def step(state):
        return gsa_step(q, k, v, g, state, hide_unwritten=True, position_offset=position)[0]

    expected = [step(eager) for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step(graphed)
    for want in expected:
        graph.replay()
        assert torch.equal(o, want)
    assert torch.equal(graphed.keys, eager.keys)


def test_compiled_layer_without_graph_breaks():
    gate = window(100, 2, 32)
    tensors = on_gpu(case(100, B=1, HQ=8, H=2, D=64, Dv=64, M=32), torch.bfloat16)

    def layer(q, k, v, logits, **options):
        o, state = gsa(q.sin(), k, v, logits * 2, gate=gate, hide_unwritten=True, **options)
        return o.cos(), state

    expected = run(layer, tensors)
    actual = run(torch.compile(layer, fullgraph=True), tensors)
    assert_near(actual, expected, 1e-2)

    def token(q, k, v, logits, keys, values):
        o, _ = gsa_step(q.sin(), k, v, logits, (keys, values), gate=gate._replace(slot=gate.slot[:, :1]))
        return o.cos(), keys, values

    now = [x.detach()[:, :1] for x in tensors[:4]]
    states = [[x.detach().clone() for x in tensors[4:]] for _ in range(2)]
    results = [f(*now, *state) for f, state in zip((token, torch.compile(token, fullgraph=True)), states, strict=True)]
    for a, b in zip(*results, strict=True):
        assert_near({"": b}, {"": a}, 1e-2)


def test_more_elements_than_int32_counts():
    """q holds 2³¹ elements and more: the end of it has to come out as if it stood alone."""
    T, HQ, D, M, tail = 2**31 // (32 * 128) + 1000, 32, 128, 16, 700
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v, g = normal(1, T, HQ, D), normal(1, T, 1, D), normal(1, T, 1, D), -normal(1, T, 1, M).float().abs()
    split = T - tail
    with torch.no_grad():
        _, state = gsa(q[:, :split], k[:, :split], v[:, :split], g[:, :split], output_final_state=True)
    whole = [x.requires_grad_() for x in (q, k, v, g)]
    o, _ = gsa(*whole)
    cotangent = torch.zeros_like(o)
    cotangent[:, split:] = normal(1, tail, HQ, D)
    gradients = torch.autograd.grad(o, whole, cotangent)
    alone = [x.detach()[:, split:].clone().requires_grad_() for x in whole]
    expected, _ = gsa(*alone, initial_state=state)
    assert_near({"o": o[:, split:]}, {"o": expected}, 1e-2)
    wanted = torch.autograd.grad(expected, alone, cotangent[:, split:])
    for name, a, b in zip("qkvg", gradients, wanted, strict=True):
        assert_near({name: a[:, split:]}, {name: b}, 2e-2)


def test_left_padding_is_no_padding():
    gate = window(120, 2, 32)
    tensors = on_gpu(case(120, B=1, HQ=4, H=2, D=64, Dv=64, M=32), torch.float32)
    q, k, v, logits = (x.detach() for x in tensors[:4])
    expected, state = gsa(q, k, v, logits, gate=gate, hide_unwritten=True, output_final_state=True)
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 7, 0), value=3.0) for x in (q, k, v, logits)]
    slot = torch.nn.functional.pad(gate.slot, (0, 0, 7, 0), value=-1)
    o, after = gsa(
        *padded, gate=gate._replace(slot=slot), hide_unwritten=True, position_offset=-7, output_final_state=True
    )
    assert_near({"o": o[:, 7:], "k": after.keys}, {"o": expected, "k": state.keys}, 1e-5)
