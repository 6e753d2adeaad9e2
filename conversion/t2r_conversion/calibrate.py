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
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from t2r.model.configuration_t2r import T2RConfig
from t2r.model.modeling_t2r import T2RDecoderLayer, rotate
from t2r.model.positions import Positions
from t2r.model.routing import routed_schedule
from t2r_conversion.headers import one_line

WINDOW = 1024  # tokens
LATER, FAR = 24, 400  # a token matters by the queries that come so many tokens later: not before, not after
ENDING = 64  # tokens before a window's end, which hardly any query follows
RIDGE = 0.01  # per token, on standardised inputs
SPREADS = (0.7, 1.0, 1.4)  # factors on the logarithm of importance, to choose from
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
        errors: squared distance of each routed layer's output from its softmax attention's, relative to that one's
            squared length, mean over heads: what is lost where contexts are longer than `num_slots`.
    """

    tensors: dict[str, Tensor]
    r_squared: list[float]
    errors: list[float]


def fit_routers(config: T2RConfig, files: dict[str, Path], windows: Tensor, progress: Progress | None = None) -> Fit:
    """Routers that foresee how much attention each token will receive.

    A token's importance to a key/value head is the root mean square, over the queries that come `LATER` to `FAR` tokens
    later, of the softmax attention that it receives from the query heads: what a few need much counts for more than
    what many glance at. Its logarithm is regressed (ridge) on the layer's input, and multiplied by the factor of
    `SPREADS` that distorts the head's output least. A layer reads what the converted model will give it: layers before
    it attend to what their slots hold. Memory holds one layer at a time, the text's hidden states in fp32 and
    attention of one window and head.

    Args:
        config: of the converted model.
        files: which safetensors file holds each of the source's tensors.
        windows: tokens, `[windows, length]`.
        progress: called with the layers done and in all after each.
    """
    if torch.cuda.is_available():
        try:
            return _fit(config, files, windows, progress, torch.device("cuda"))
        except torch.OutOfMemoryError:
            warnings.warn("the GPU is too full to fit routers on; the CPU does it", stacklevel=2)
            torch.cuda.empty_cache()
    return _fit(config, files, windows, progress, torch.device("cpu"))


@torch.no_grad()
def _fit(
    config: T2RConfig, files: dict[str, Path], windows: Tensor, progress: Progress | None, device: torch.device
) -> Fit:
    softmax = copy(config)
    softmax.layer_types = [config.softmax_type] * config.num_hidden_layers
    rope = Phi3RotaryEmbedding(config).to(device)
    rotation = rope(torch.zeros(1, device=device), torch.arange(windows.shape[1], device=device)[None])
    embedding = _tensor(files, "model.embed_tokens.weight")
    hidden = [embedding[row].float().to(device) for row in windows]  # each [L, hidden]
    del embedding
    last = max(config.slot_layers, default=-1)
    counted = slice(config.num_sinks, windows.shape[1] - ENDING)
    fit = Fit({}, [], [])
    for number in range(last + 1):
        layer = _layer(softmax, files, number, device)
        attention, inputs = layer.self_attn, [layer.input_layernorm(x) for x in hidden]
        ends: Tensor | list[None] = [None] * len(inputs)
        if number in config.slot_layers:
            importance = [_received(attention, x, rotation, softmax) for x in inputs]
            x, y = (torch.cat([part[counted] for part in parts]) for parts in (inputs, importance))
            weight, bias, r_squared = ridge(x, y.log())
            foreseen = torch.stack([x @ weight.T + bias for x in inputs])  # [windows, L, H]
            ways = torch.stack([lifetimes(_slots(foreseen * spread, config)) for spread in SPREADS])
            heads = [_heads(attention, x, rotation, softmax) for x in inputs[:CHOOSING]]
            errors, best = distortion(heads, ways, config.num_slots).min(0)  # [H]
            ends = ways.gather(0, best.expand_as(ways[:1]))[0]  # [windows, L, H]
            spread = torch.tensor(SPREADS, device=device)[best]
            name = f"model.layers.{number}.self_attn.router."
            fit.tensors[name + "weight"] = (weight * spread[:, None]).cpu()
            fit.tensors[name + "bias"] = (bias * spread).cpu()
            fit.r_squared.append(r_squared)
            fit.errors.append(errors.mean().item())
        for i, x in enumerate(hidden):
            x = x + _attend(attention, inputs[i], rotation, softmax, ends[i])
            hidden[i] = x + layer.mlp(layer.post_attention_layernorm(x))
        if progress is not None:
            progress(number + 1, last + 1)
    return fit


def distortion(heads: list[Iterator[tuple[Tensor, Tensor]]], ways: Tensor, num_slots: int) -> Tensor:
    """How far attention to what the slots hold is from attention to everything, for several ways to give slots.

    Args:
        heads: for each window, attention weights `[G, L, L]` and values `[L, D]` of each key/value head.
        ways: the position at which each token's slot is taken over, `[ways, windows, L, H]`.
        num_slots: what comes within them is the same in all ways.

    Returns:
        Squared distance relative to the squared length, mean over windows, `[ways, H]`.
    """
    queries = torch.arange(num_slots, ways.shape[2], QUERIES, device=ways.device)
    errors = []
    for window, of_window in enumerate(heads):
        for head, (weights, v) in enumerate(of_window):
            weights = weights[:, queries]  # [G, Q, L]
            expected = weights @ v
            for ends in ways[:, window, :, head]:
                distance = held(weights, queries, ends) @ v - expected
                errors.append(distance.square().sum() / expected.square().sum())
    return torch.stack(errors).view(len(heads), -1, len(ways)).mean(0).T


def held(weights: Tensor, queries: Tensor, ends: Tensor) -> Tensor:
    """Attention `[G, Q, L]` to the tokens that slots still hold: queries are at `[Q]`, tokens end at `[L]`."""
    kept = weights * (queries[:, None] < ends)
    return kept / kept.sum(-1, keepdim=True).clamp_min(1e-9)


def _slots(importance: Tensor, config: T2RConfig) -> Tensor:
    """The slots that tokens of windows take over: `[windows, L, H]` both."""
    positions = Positions.resolve(importance[..., :1], None, None, None, 0)
    return routed_schedule(importance, positions, config)[0]


def lifetimes(slots: Tensor) -> Tensor:
    """The position at which another token takes over each token's slot: `[..., L, H]` to the same, L for none."""
    L = slots.shape[-2]
    order = slots.argsort(stable=True, dim=-2)  # by slot, then by position
    of_slot = slots.gather(-2, order)
    successor = torch.full_like(order, L)
    same = of_slot[..., 1:, :] == of_slot[..., :-1, :]
    successor[..., :-1, :] = torch.where(same, order[..., 1:, :], L)
    return torch.empty_like(order).scatter_(-2, order, successor)


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Ridge regression of `y [n, k]` on standardised `x [n, d]`.

    Returns:
        Weights for `x` as it is, `[k, d]`; the bias with which predictions have mean 0, `[k]`; and R² on these data,
        mean over `k`.
    """
    scale = x.std(0).clamp_min(1e-6)
    standard, centred = (x - x.mean(0)) / scale, (y - y.mean(0)).double()
    gram = (standard.T @ standard).double()
    gram.diagonal().add_(RIDGE * len(x))
    weight = torch.linalg.solve(gram, (standard.double().T @ centred))  # [d, k]
    left = (centred - standard.double() @ weight).square().sum(0)
    fit = (1 - left / centred.square().sum(0)).mean().item()
    weight = (weight.T / scale).float()
    return weight, -weight @ x.mean(0), fit


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


def _received(attention, x: Tensor, rotation: tuple[Tensor, Tensor], config: T2RConfig) -> Tensor:
    """The attention that each token of a window `[L, hidden]` receives later: importance, `[L, H]`."""
    ahead = _ahead(x)
    later = (ahead >= LATER) & (ahead < FAR)
    received = [
        ((weights.square().sum(0) * later).sum(0) / later.sum(0).clamp_min(1)).sqrt()
        for weights, _ in _heads(attention, x, rotation, config)
    ]
    return torch.stack(received, 1).clamp_min(1e-9)


def _attend(attention, x: Tensor, rotation: tuple[Tensor, Tensor], config: T2RConfig, ends: Tensor | None) -> Tensor:
    """Softmax attention of one window `[L, hidden]`, to all tokens or to those whose slots have not been taken over."""
    queries, outputs = torch.arange(len(x), device=x.device), []
    for head, (weights, v) in enumerate(_heads(attention, x, rotation, config)):
        weights = weights if ends is None else held(weights, queries, ends[:, head])
        outputs.append((weights @ v).transpose(0, 1).flatten(1))  # [L, G * D]
    return attention.o_proj(torch.cat(outputs, 1))


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
