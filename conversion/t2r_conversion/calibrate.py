"""Fit the routers of a model to its source's attention on a text, one layer at a time."""

import json
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from t2r.model.configuration_t2r import LINEAR_ATTENTION, T2RConfig
from t2r.model.modeling_t2r import T2RDecoderLayer, rotate

WINDOW = 1024  # tokens
LATER, FAR = 24, 400  # a token matters by the queries that come so many tokens later: not before, not after
ENDING = 64  # tokens before a window's end, which hardly any query follows
RIDGE = 0.01  # per token, on standardised inputs
SHARE = 0.1  # of the tokens in a ring that deserve the next one

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What routers are fitted to.

    Attributes:
        text: name of the file.
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
    text: str | Path, tokens: int, tokenizer_folder: Path, progress: Progress | None = None
) -> Calibration:
    """The first windows of a text, each within one document.

    Args:
        text: a `.txt` file, which is one document, or a `.jsonl` file with a `text` in each line; see `check_text`.
        tokens: how many at most.
        tokenizer_folder: of the source.
        progress: see `Calibration`.

    Raises:
        ValueError: it has no document of a window's length.
    """
    text, windows = Path(text), []
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for document in _documents(text):
        wanted = tokens // WINDOW - len(windows)
        if wanted <= 0:
            break
        ids = tokenizer(document[: 16 * WINDOW * wanted], add_special_tokens=False, verbose=False)["input_ids"]
        windows += torch.tensor(ids).split(WINDOW)[: min(wanted, len(ids) // WINDOW)]
    if not windows:
        raise ValueError(f"{text}: no document, or none of {WINDOW} tokens, to calibrate on; use a longer text")
    return Calibration(text.name, torch.stack(windows), progress)


def _documents(text: Path) -> Iterator[str]:
    with text.open(encoding="utf-8") as file:
        if text.suffix != ".jsonl":
            yield file.read()
        else:
            yield from (json.loads(line)["text"] for line in file if line.strip())


def check_text(text: str | Path) -> None:
    """Raise ValueError if there is no such file."""
    if not Path(text).is_file():
        raise ValueError(f"{text}: no such file to calibrate on")


@torch.no_grad()
def fit_routers(
    config: T2RConfig, files: dict[str, Path], windows: Tensor, progress: Progress | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """Routers that foresee how much attention each token will receive.

    A token's importance to a key/value head is the root mean square, over the queries that come `LATER` to `FAR` tokens
    later, of the softmax attention that it receives from the query heads: what a few need much counts for more than
    what many glance at. Its logarithm is regressed (ridge) on the layer's input; the thresholds let `SHARE` of the
    tokens on from each ring to the next. Memory holds one layer at a time, the text's hidden states in fp32 and
    attention of one window and head.

    Args:
        config: of the converted model.
        files: which safetensors file holds each of the source's tensors.
        windows: tokens, `[windows, length]`.
        progress: called with the layers done and in all after each.

    Returns:
        The routers' tensors by name, fp32; and each routed layer's R².
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    softmax = copy(config)
    softmax.layer_types = [config.softmax_type] * config.num_hidden_layers
    rope = LlamaRotaryEmbedding(config).to(device)
    cos, sin = rope(torch.zeros(1, device=device), torch.arange(windows.shape[1], device=device)[None])
    embedding = _tensor(files, "model.embed_tokens.weight")
    hidden = [embedding[row].float().to(device) for row in windows]  # each [L, hidden]
    del embedding
    last = max((i for i, kind in enumerate(config.layer_types) if kind == LINEAR_ATTENTION), default=-1)
    fitted, fits = {}, []
    for number in range(last + 1):
        layer, inputs, importance = _layer(softmax, files, number, device), [], []
        for i, x in enumerate(hidden):
            normed = layer.input_layernorm(x)
            attended, received = _attend(layer.self_attn, normed, cos, sin, softmax)
            inputs.append(normed)
            importance.append(received)
            x = x + attended
            hidden[i] = x + layer.mlp(layer.post_attention_layernorm(x))
        if config.layer_types[number] == LINEAR_ATTENTION:
            counted = slice(config.num_sinks, windows.shape[1] - ENDING)
            x, y = (torch.cat([part[counted] for part in parts]) for parts in (inputs, importance))
            weight, fit = ridge(x, y.log())
            name = f"model.layers.{number}.self_attn.router."
            fitted[name + "weight"] = weight.cpu()
            fitted[name + "thresholds"] = thresholds(x @ weight.T, len(config.rings) - 1).cpu()
            fits.append(fit)
        if progress is not None:
            progress(number + 1, last + 1)
    return fitted, fits


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


def thresholds(scores: Tensor, count: int) -> Tensor:
    """Scores that `SHARE` of all tokens exceed, `SHARE` of these, and so on: `[n, heads]` to `[heads, count]`."""
    ranks = torch.tensor([1 - SHARE**i for i in range(1, count + 1)], device=scores.device)
    return torch.stack([torch.quantile(head, ranks) for head in scores.T])


def _attend(attention, x: Tensor, cos: Tensor, sin: Tensor, config: T2RConfig) -> tuple[Tensor, Tensor]:
    """Softmax attention of one window `[L, hidden]`; and what each token and head receives later, `[L, H]`."""
    L, D = len(x), config.head_dim
    q, k = rotate(attention.q_proj(x).view(1, L, -1, D), attention.k_proj(x).view(1, L, -1, D), cos, sin)
    v = attention.v_proj(x).view(L, -1, D)
    ahead = torch.arange(L, device=x.device)[:, None] - torch.arange(L, device=x.device)  # query less key
    seen = ahead >= 0
    if config.sliding_window is not None:
        seen &= ahead < config.sliding_window
    later = (ahead >= LATER) & (ahead < FAR)
    group = config.num_attention_heads // config.num_key_value_heads
    outputs, received = [], []
    for head in range(config.num_key_value_heads):
        queries = q[0, :, head * group : (head + 1) * group].transpose(0, 1)  # [G, L, D]
        logits = queries @ k[0, :, head].T * D**-0.5  # [G, L, L]
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append((weights @ v[:, head]).transpose(0, 1).flatten(1))  # [L, G * D]
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
