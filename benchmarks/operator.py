"""Gated Slot Attention on one GPU, beside flash-linear-attention, softmax attention and the memory floor.

`python -m benchmarks.operator` measures, prints a table and writes `operator.json` and `operator.png`;
`--no-measure` only draws the picture anew. flash-linear-attention (`pip install flash-linear-attention`) is optional.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.peers import compile_flash_linear_attention, flash_linear_attention, softmax_attention
from benchmarks.record import write_results
from t2r_kernels import Gate, gsa, gsa_step

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """One attention layer's heads."""

    name: str
    heads: int
    state_heads: int
    width: int
    num_slots: int


MISTRAL, WIDE, SMOL = (
    Shape("", 32, 8, 128, 64),
    Shape("m128-", 32, 8, 128, 128),
    Shape("smollm2-", 9, 3, 64, 64),
)
LENGTHS = [(8, 2048), (4, 4096), (2, 8192), (1, 16384), (1, 32768), (1, 131072)]
WHOLE = [(MISTRAL, *x) for x in LENGTHS] + [(SMOL, 8, 2048)] + [(WIDE, *x) for x in LENGTHS]
DECODE = [1, 8, 32, 256]


def main() -> None:
    """Measure, or draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for operator.json and operator.png")
    parser.add_argument("--no-measure", action="store_true", help="only draw operator.png from operator.json")
    parser.add_argument("--no-peers", action="store_true", help="measure t2r and the floor alone")
    options = parser.parse_args()
    if not options.no_measure:
        rows: dict[str, dict] = {}
        for more in measure(peers=not options.no_peers):
            print(table(more, header=not rows), flush=True)
            for row in more:
                rows.setdefault(row["name"], {}).update(row)
            # after each, so that a run that is cut off leaves something
            write_results("operator", list(rows.values()), options.out)
    draw(options.out)


def measure(peers: bool) -> Iterator[list[dict]]:
    """All rows of `operator.json`, a few at a time; those of flash-linear-attention by themselves, at the end."""
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    yield [
        {"name": "copy_bandwidth", "unit": "TB/s", "ours": round(bandwidth / 1e12, 3)},
        {"name": "first_call/8x2048", "unit": "s", "ours": round(first_call(), 2)},
    ]
    yield [decode(B, bandwidth, {"ours": our_step(B)}) for B in DECODE]
    ours = {"ours": lambda q, k, v, logits, gate: gsa(q, k, v, logits, gate=gate, hide_unwritten=True)[0]}
    softmax = {"sdpa": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION} if peers else {}
    softmax = {name: softmax_attention(backend) for name, backend in softmax.items()}
    for shape, B, T in WHOLE:
        yield whole(shape, B, T, bandwidth, ours if shape is WIDE else ours | softmax)
    yield [overwritten(bandwidth)]
    fla = flash_linear_attention() if peers else None
    if fla is not None:
        compile_flash_linear_attention(len(os.sched_getaffinity(0)))
        yield [decode(B, bandwidth, {"fla": flash_linear_attention(recurrent=True)}) for B in DECODE]
        for B, T in LENGTHS:
            yield whole(MISTRAL, B, T, bandwidth, {"fla": fla})


def first_call() -> float:
    """Seconds of the first forward and backward pass at a shape, compilation included (no file is cached yet)."""
    q, k, v, logits, gate = inputs(MISTRAL, 8, 2048)
    start = time.perf_counter()
    o, _ = gsa(q, k, v, logits, gate=gate, hide_unwritten=True)
    o.sum().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def whole(shape: Shape, B: int, T: int, bandwidth: float, runs: dict[str, Callable]) -> list[dict]:
    """Forward, forward + backward (GPU time, and the host's to issue it) and peak memory over whole sequences."""
    sets = [inputs(shape, B, T) for _ in range(2)]
    do = torch.randn_like(sets[0][0])
    read, name = sum(x.nbytes for x in sets[0][:4]), f"{shape.name}{B}x{T}"
    forward, both, host, peak = (
        {"name": f"{kind}/{name}", "unit": unit}
        for kind, unit in (("forward", "ms"), ("forward_backward", "ms"), ("host", "ms"), ("peak_mib", "MiB"))
    )
    for peer, run in runs.items():

        def pass_(x, run=run):
            return torch.autograd.grad(run(*x), x[:4], do, allow_unused=True)

        forward[peer] = milliseconds(without_gradients(run), sets)
        both[peer] = milliseconds(pass_, sets)
        host[peer] = host_milliseconds(lambda pass_=pass_: pass_(sets[0]))
        peak[peer] = peak_mib(lambda pass_=pass_: pass_(sets[0]))
    forward["floor"] = round((read + do.nbytes) / bandwidth * 1e3, 4)
    both["floor"] = round((3 * read + 2 * do.nbytes) / bandwidth * 1e3, 4)
    return [forward, both, host, peak]


def overwritten(bandwidth: float) -> dict:
    """The worst case: every token overwrites every slot, and each chunk needs all bands of the slow path."""
    sets = []
    for _ in range(2):
        q, k, v, logits, _ = inputs(MISTRAL, 8, 2048)
        sets.append((q, k, v, torch.full_like(logits, -30.0, dtype=torch.float32)))
    floor = (sum(x.nbytes for x in sets[0]) + sets[0][0].nbytes) / bandwidth * 1e3
    run = without_gradients(lambda q, k, v, g: gsa(q, k, v, g)[0])
    return {"name": "forward/8x2048-overwrite", "unit": "ms", "ours": milliseconds(run, sets), "floor": round(floor, 4)}


def decode(B: int, bandwidth: float, runs: dict[str, Callable]) -> dict:
    """One token for each of B sequences, replayed from a CUDA graph over states that do not fit into the cache."""
    shape, sets = MISTRAL, []
    state_bytes = 2 * B * shape.state_heads * shape.num_slots * shape.width * 4
    for _ in range(max(4, min(64, int(2e8 / state_bytes)))):
        q, k, v, logits, gate = (x.detach() if isinstance(x, Tensor) else x for x in inputs(shape, B, 1))
        keys = torch.randn(B, shape.state_heads, shape.num_slots, shape.width, device="cuda")
        sets.append((q, k, v, logits, gate, (keys, torch.randn_like(keys))))
    times = {peer: graph_milliseconds(run, sets) for peer, run in runs.items()}
    moved = 2 * state_bytes + sum(x.nbytes for x in sets[0][:4]) + sets[0][0].nbytes
    return {"name": f"decode/{B}", "unit": "ms"} | times | {"floor": round(moved / bandwidth * 1e3, 4)}


def our_step(B: int) -> Callable:
    """One token with `gsa_step`, late enough in its sequence that every slot is visible."""
    position = torch.full((B,), 100, device="cuda")

    def run(q, k, v, logits, gate, state):
        gsa_step(q, k, v, logits, state, gate=gate, hide_unwritten=True, position_offset=position)

    return run


def inputs(shape: Shape, B: int, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Gate]:
    """bf16 q, k, v and gate logits that want gradients, and the window start's gate."""

    def normal(*size):
        return torch.randn(B, T, *size, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = (normal(heads, shape.width) for heads in (shape.heads, shape.state_heads, shape.state_heads))
    position, ring = torch.arange(T, device="cuda"), shape.num_slots - 4
    slot = torch.where(position < 4, position, 4 + (position - 4) % ring).int()
    gate = Gate(slot[None, :, None].expand(B, T, shape.state_heads), write_logit=7.0, keep_logit=12.0)
    return q, k, v, normal(shape.state_heads, shape.num_slots), gate


def without_gradients(run: Callable) -> Callable[[tuple], Tensor]:
    """`run` on one set of inputs under `no_grad`."""

    def call(x):
        with torch.no_grad():
            return run(*x)

    return call


def milliseconds(run: Callable, sets: list, budget: float = 0.4) -> float:
    """GPU time of a call: the median over single calls on rotating inputs, after two rounds to warm up.

    The device sleeps before each call for as long as the host takes to issue it, so that no launch is waited for.
    """
    for x in sets * 2:
        run(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(sets[0])
    issued = time.perf_counter() - start
    torch.cuda.synchronize()
    calls = max(3, min(200, int(budget / (time.perf_counter() - start))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for i, (begin, end) in enumerate(events):
        torch.cuda._sleep(int(4e9 * issued))  # cycles
        begin.record()
        run(sets[i % len(sets)])
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(begin.elapsed_time(end) for begin, end in events), 4)


def host_milliseconds(run: Callable, calls: int = 20) -> float:
    """Time of the host to issue a call, whatever the device does: the median."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e3, 4)


def graph_milliseconds(run: Callable, sets: list) -> float:
    """Time of one call, from a CUDA graph of one call on each set."""
    with torch.no_grad():
        for x in sets:
            run(*x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in sets:
                run(*x)
    return round(milliseconds(lambda _: graph.replay(), [None, None]) / len(sets), 5)


def peak_mib(run: Callable) -> float:
    """Peak memory of a call beyond what is allocated before it and the gradients that it returns, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = run()
    kept = sum(x.nbytes for x in gradients if x is not None)
    return round((torch.cuda.max_memory_allocated() - before - kept) / 2**20, 1)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.nbytes / milliseconds(lambda _: y.copy_(x), [None, None]) * 1e3


def table(rows: list[dict], header: bool) -> str:
    """The rows, one a line."""
    peers = ("ours", "fla", "sdpa", "cudnn", "floor")
    lines = [f"{'':34s}" + "".join(f"{peer:>10s}" for peer in peers)] if header else []
    for row in rows:
        values = (f"{row[peer]:10.4g}" if row.get(peer) is not None else f"{'–':>10s}" for peer in peers)
        lines.append(f"{row['name']:28s} {row['unit']:5s}" + "".join(values))
    return "\n".join(lines)


def draw(out: Path) -> None:
    """Forward + backward against sequence length, per 1,024 tokens: `operator.png`."""
    import json

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {row["name"]: row for row in json.loads((out / "operator.json").read_text(encoding="utf-8"))["rows"]}
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    labels = {"ours": "t2r, 64 slots", "fla": "flash-linear-attention", "sdpa": "softmax attention (flash)"}
    labels |= {"cudnn": "softmax attention (cuDNN)"}
    for peer, label in (*labels.items(), ("floor", "memory floor")):
        points = [
            (T, row[peer] / (B * T) * 1024 * 1e3)
            for B, T in LENGTHS
            if (row := rows.get(f"forward_backward/{B}x{T}", {})).get(peer) is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label, linestyle=":" if peer == "floor" else "-")
    axes.set(xscale="log", yscale="log", xlabel="sequence length (tokens)", ylabel="µs per 1,024 tokens",
             title="One attention layer of Mistral-7B's shape, forward + backward, bf16")  # fmt: skip
    axes.set_xticks([T for _, T in LENGTHS], [f"{T // 1024}K" for _, T in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "operator.png", dpi=150)


if __name__ == "__main__":
    main()
