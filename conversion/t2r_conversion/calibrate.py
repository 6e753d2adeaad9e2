"""Fit the routers of a model to its source's attention on a text, one layer at a time."""

import json
import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from t2r.model.configuration_t2r import T2RConfig
from t2r.model.modeling_t2r import T2RDecoderLayer, rotate
from t2r.model.positions import Positions
from t2r.model.rings import ring_schedule
from t2r_conversion.headers import one_line

WINDOW = 1024  # tokens
LATER, FAR = 24, 400  # a token matters by the queries that come so many tokens later: not before, not after
ENDING = 64  # tokens before a window's end, which hardly any query follows
RIDGE = 0.01  # per token, on standardised inputs
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the tokens in a ring that deserve the next one, to choose from
SHORT = (0.13, 0.27, 0.4, 0.53, 0.73)  # of the slots that rings share, those in the short one, to choose from
CHOOSING, QUERIES = 6, 4  # windows that the choice looks at; every so many queries of them

REFERENCE = "the reference that Python ships"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What routers are fitted to.

    Attributes:
        text: its name.
        windows: its tokens, `[windows, WINDOW]`.
        progress: called with the layers done and in all after each.
    """

    text: str
    windows: Tensor
    progress: Progress | None = None

    def as_dict(self) -> dict[str, str | int]:
        """For the record."""
        return {"text": self.text, "tokens": self.windows.numel()}


def calibration_of(
    text: str | Path | None,
    tokens: int,
    num_slots: int,
    tokenizer_folder: Path,
    progress: Progress | None = None,
) -> Calibration:
    """The first windows of a text, each within one document.

    Args:
        text: a `.txt` file, which is one document, or a `.jsonl` file with a `text` in each line; see `check_text`.
            None for English that every CPython ships, the reference behind `help()`.
        tokens: how many at most.
        num_slots: of the converted model; windows have twice as many tokens, and at least `WINDOW`.
        tokenizer_folder: of the source.
        progress: see `Calibration`.

    Raises:
        ValueError: it has no document of a window's length, or the source has no tokenizer.
    """
    windows, window = [], max(WINDOW, 2 * num_slots)
    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    except Exception as error:  # whatever transformers and tokenizers raise
        raise ValueError(
            "the source has no tokenizer that works, so routers cannot be fitted to a text; use start 'window' "
            f"({one_line(error)})"
        ) from error
    for document in [reference()] if text is None and window > WINDOW else _documents(text):
        wanted = tokens // window - len(windows)
        if wanted <= 0:
            break
        ids = tokenizer(document[: 16 * window * wanted], add_special_tokens=False, verbose=False)["input_ids"]
        windows += torch.tensor(ids).split(window)[: min(wanted, len(ids) // window)]
    if not windows:
        raise ValueError(
            f"{text or REFERENCE}: no document, or none of {window} tokens, to calibrate on; use a longer text, more "
            "calibration tokens, or start 'window'"
        )
    return Calibration(Path(text).name if text else REFERENCE, torch.stack(windows), progress)


def reference() -> str:
    """The text that `REFERENCE` names, whole."""
    return "\n\n".join(topic for _, topic in sorted(topics.items()))


def _documents(text: str | Path | None) -> Iterator[str]:
    if text is None:
        yield from (topic for _, topic in sorted(topics.items()))
        return
    text = Path(text)
    with text.open(encoding="utf-8") as file:
        if text.suffix != ".jsonl":
            yield file.read()
        else:
            yield from (_text_of(line, f"{text}, line {i}") for i, line in enumerate(file, 1) if line.strip())


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({one_line(error)})") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"{where}: no `text` to calibrate on")
    return row["text"]


def check_text(text: str | Path) -> None:
    """Raise ValueError if there is no such file."""
    if not Path(text).is_file():
        raise ValueError(f"{text}: no such file to calibrate on")


@dataclass(frozen=True)
class Fit:
    """Fitted routers.

    Attributes:
        tensors: by name, fp32.
        r_squared: of each routed layer.
        rings: sizes of each layer's rings, of those without a router as they were.
        errors: squared distance of each routed layer's output from its softmax attention's, relative to that one's
            squared length, mean over heads: what is lost where contexts are longer than `num_slots`.
    """

    tensors: dict[str, Tensor]
    r_squared: list[float]
    rings: list[list[int]]
    errors: list[float]


def fit_routers(
    config: T2RConfig, files: dict[str, Path], windows: Tensor, choose: bool = True, progress: Progress | None = None
) -> Fit:
    """Routers that foresee how much attention each token will receive.

    A token's importance to a key/value head is the root mean square, over the queries that come `LATER` to `FAR` tokens
    later, of the softmax attention that it receives from the query heads: what a few need much counts for more than
    what many glance at. Its logarithm is regressed (ridge) on the layer's input. How many tokens go on from each ring
    to the next, and the rings' sizes, are those of `SHARES` and `SHORT` that distort the layer's output least. Memory
    holds one layer at a time, the text's hidden states in fp32 and attention of one window and head.

    Args:
        config: of the converted model.
        files: which safetensors file holds each of the source's tensors.
        windows: tokens, `[windows, length]`.
        choose: whether the sizes of rings are to be chosen, or stay as in `config`.
        progress: called with the layers done and in all after each.
    """
    if torch.cuda.is_available():
        try:
            return _fit(config, files, windows, choose, progress, torch.device("cuda"))
        except torch.OutOfMemoryError:
            warnings.warn("the GPU is too full to fit routers on; the CPU does it", stacklevel=2)
            torch.cuda.empty_cache()
    return _fit(config, files, windows, choose, progress, torch.device("cpu"))


@torch.no_grad()
def _fit(
    config: T2RConfig,
    files: dict[str, Path],
    windows: Tensor,
    choose: bool,
    progress: Progress | None,
    device: torch.device,
) -> Fit:
    softmax = copy(config)
    softmax.layer_types = [config.softmax_type] * config.num_hidden_layers
    rope = LlamaRotaryEmbedding(config).to(device)
    rotation = rope(torch.zeros(1, device=device), torch.arange(windows.shape[1], device=device)[None])
    embedding = _tensor(files, "model.embed_tokens.weight")
    hidden = [embedding[row].float().to(device) for row in windows]  # each [L, hidden]
    del embedding
    last = max(config.slot_layers, default=-1)
    fit = Fit({}, [], [list(config.rings_of(i)) for i in range(config.num_hidden_layers)], [])
    for number in range(last + 1):
        layer, inputs, importance = _layer(softmax, files, number, device), [], []
        for i, x in enumerate(hidden):
            normed = layer.input_layernorm(x)
            attended, received = _attend(layer.self_attn, normed, rotation, softmax)
            inputs.append(normed)
            importance.append(received)
            x = x + attended
            hidden[i] = x + layer.mlp(layer.post_attention_layernorm(x))
        if number in config.slot_layers:
            counted = slice(config.num_sinks, windows.shape[1] - ENDING)
            x, y = (torch.cat([part[counted] for part in parts]) for parts in (inputs, importance))
            weight, r_squared = ridge(x, y.log())
            candidates = _candidates(fit.rings[number], choose)
            heads = [_heads(layer.self_attn, x, rotation, softmax) for x in inputs[:CHOOSING]]
            scores = [x @ weight.T for x in inputs]
            limits = [thresholds(x @ weight.T, len(rings) - 1, share) for rings, share in candidates]
            errors = distortion(heads, scores, limits, [rings for rings, _ in candidates], config)
            best = int(errors.argmin())
            name = f"model.layers.{number}.self_attn.router."
            fit.tensors[name + "weight"] = weight.cpu()
            fit.tensors[name + "thresholds"] = limits[best].cpu()
            fit.rings[number] = candidates[best][0]
            fit.r_squared.append(r_squared)
            fit.errors.append(errors[best].item())
        if progress is not None:
            progress(number + 1, last + 1)
    return fit


def _candidates(rings: list[int], choose: bool) -> list[tuple[list[int], float]]:
    """Sizes of rings, and the share of tokens that each ring lets on."""
    sizes, slots = [list(rings)], sum(rings)
    if choose and len(rings) == 2:
        shorts = sorted({min(max(1, round(slots * part)), slots - 1) for part in SHORT})
        sizes = [[short, slots - short] for short in shorts]
    return [(each, share) for each in sizes for share in SHARES]


def distortion(
    heads: list[Iterator[tuple[Tensor, Tensor]]],
    scores: list[Tensor],
    limits: list[Tensor],
    rings: list[list[int]],
    config: T2RConfig,
) -> Tensor:
    """How far attention to what the slots hold is from attention to everything, for several ways to route.

    Args:
        heads: for each window, attention weights `[G, L, L]` and values `[L, D]` of each key/value head.
        scores: routers' scores of each window's tokens, `[L, H]`.
        limits: of each way, the thresholds `[H, rings - 1]`.
        rings: of each way, the sizes.
        config: of the converted model.

    Returns:
        Squared distance relative to the squared length, mean over heads and windows, `[ways]`.
    """
    L, device = len(scores[0]), scores[0].device
    positions = Positions.resolve(torch.empty(1, L, 1, device=device), None, None, None, 0)
    queries = torch.arange(config.num_slots, L, QUERIES, device=device)
    errors = []
    for of_window, score in zip(heads, scores, strict=False):
        until = []
        for limit, sizes in zip(limits, rings, strict=True):
            choice = (score.unsqueeze(-1) > limit).sum(-1)  # [L, H]
            until.append(lifetimes(ring_schedule(choice[None], positions, config, sizes)[0][0]))
        for head, (weights, v) in enumerate(of_window):
            weights = weights[:, queries]  # [G, Q, L]
            expected = weights @ v
            for ends in until:
                held = weights * (queries[:, None] < ends[:, head])
                distance = (held @ v) / held.sum(-1, keepdim=True).clamp_min(1e-9) - expected
                errors.append(distance.square().sum() / expected.square().sum())
    return torch.stack(errors).view(-1, len(rings)).mean(0)


def lifetimes(slots: Tensor) -> Tensor:
    """The position at which another token takes over each token's slot: `[L, H]` to `[L, H]`, L for none."""
    L = len(slots)
    order = slots.argsort(stable=True, dim=0)  # [L, H]: by slot, then by position
    sorted_slots = slots.gather(0, order)
    successor = torch.full_like(order, L)
    successor[:-1] = torch.where(sorted_slots[1:] == sorted_slots[:-1], order[1:], L)
    return torch.empty_like(order).scatter_(0, order, successor)


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Ridge regression of `y [n, k]` on standardised `x [n, d]`.

    Returns:
        Weights for `x` as it is, `[k, d]`, without the constant; and R² on these data, mean over `k`.
    """
    scale = x.std(0).clamp_min(1e-6)
    standard, centred = (x - x.mean(0)) / scale, (y - y.mean(0)).double()
    gram = (standard.T @ standard).double()
    gram.diagonal().add_(RIDGE * len(x))
    weight = torch.linalg.solve(gram, (standard.double().T @ centred))  # [d, k]
    left = (centred - standard.double() @ weight).square().sum(0)
    fit = (1 - left / centred.square().sum(0)).mean().item()
    return (weight.T / scale).float(), fit


def thresholds(scores: Tensor, count: int, share: float) -> Tensor:
    """Scores that a share of all tokens exceeds, that share of these, and so on: `[n, heads]` to `[heads, count]`."""
    ranks = torch.tensor([1 - share**i for i in range(1, count + 1)], device=scores.device)
    return torch.stack([torch.quantile(head, ranks) for head in scores.T])


def _heads(attention, x: Tensor, rotation: tuple[Tensor, Tensor], config: T2RConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Softmax attention of one window `[L, hidden]`: weights `[G, L, L]` and values `[L, D]` of each key/value head."""
    q, k, v = attention.project(x[None])
    (q, k), v = rotate(q, k, *rotation), v[0]
    ahead = _ahead(x)
    seen = ahead >= 0
    if config.sliding_window is not None:
        seen &= ahead < config.sliding_window
    group = config.num_attention_heads // config.num_key_value_heads
    for head in range(config.num_key_value_heads):
        queries = q[0, :, head * group : (head + 1) * group].transpose(0, 1)  # [G, L, D]
        logits = queries @ k[0, :, head].T * config.head_dim**-0.5  # [G, L, L]
        yield logits.masked_fill(~seen, float("-inf")).softmax(-1), v[:, head]


def _ahead(x: Tensor) -> Tensor:
    """How far each query is ahead of each key, `[L, L]`."""
    places = torch.arange(len(x), device=x.device)
    return places[:, None] - places


def _attend(attention, x: Tensor, rotation: tuple[Tensor, Tensor], config: T2RConfig) -> tuple[Tensor, Tensor]:
    """Softmax attention of one window `[L, hidden]`; and what each token and head receives later, `[L, H]`."""
    ahead = _ahead(x)
    later = (ahead >= LATER) & (ahead < FAR)
    outputs, received = [], []
    for weights, v in _heads(attention, x, rotation, config):
        outputs.append((weights @ v).transpose(0, 1).flatten(1))  # [L, G * D]
        received.append(((weights.square().sum(0) * later).sum(0) / later.sum(0).clamp_min(1)).sqrt())
    return attention.o_proj(torch.cat(outputs, 1)), torch.stack(received, 1).clamp_min(1e-9)


def _layer(config: T2RConfig, files: dict[str, Path], number: int, device: torch.device) -> T2RDecoderLayer:
    with torch.device("meta"):
        layer = T2RDecoderLayer(config, number)
    prefix = f"model.layers.{number}."
    state = {name: _tensor(files, prefix + name).float().to(device) for name in layer.state_dict()}
    layer.load_state_dict(state, assign=True)
    return layer.eval()


def _tensor(files: dict[str, Path], name: str) -> Tensor:
    with safe_open(files[name], "pt") as file:
        return file.get_tensor(name)
