"""Perplexity over windows of a text, overall and by position, of a model beside its teacher.

A recurrent model loses its teacher where the context outgrows the state, so one number hides what matters: the bands
say how far into a window the two stay together. Each prediction belongs to the position of its query, the token that
it is made from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""

POSITIONS_AT_ONCE = 128
CURVE_BUCKETS = 32


@dataclass(frozen=True)
class Band:
    """A range of query positions, both ends included, and a figure for it: `teacher` and `ratio` may be None."""

    start: int
    end: int
    student: float
    teacher: float | None = None

    @property
    def ratio(self) -> float | None:
        """Student over teacher."""
        return None if self.teacher is None else self.student / self.teacher

    def as_dict(self) -> dict:
        """`from`, `to`, `student`, `teacher`, `ratio`."""
        figures = {"student": self.student, "teacher": self.teacher, "ratio": self.ratio}
        return {"from": self.start, "to": self.end, **figures}


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexities of a student and, if there is one, of its teacher.

    Attributes:
        windows: windows evaluated.
        window: tokens in each.
        overall: perplexities over all positions.
        bands: perplexities by band of query positions.
        per_position: mean negative log-likelihoods (nats) by up to 32 equal ranges of query positions, for plots.
    """

    windows: int
    window: int
    overall: Band
    bands: list[Band]
    per_position: list[Band]

    @property
    def tokens(self) -> int:
        """Tokens predicted: all but the first of each window."""
        return self.windows * (self.window - 1)

    def as_dict(self) -> dict:
        """The JSON form: perplexities; `tokens` counts the tokens predicted; None where there is no teacher."""
        return {
            "windows": self.windows,
            "tokens": self.tokens,
            "student": self.overall.student,
            "teacher": self.overall.teacher,
            "ratio": self.overall.ratio,
            "bands": [band.as_dict() for band in self.bands],
        }


def evaluate_perplexity(
    model,
    tokenizer,
    text: str,
    *,
    teacher=None,
    window: int = 1024,
    limit: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> PerplexityReport:
    """Perplexity of a causal language model over the windows of a text.

    Args:
        model: the student, a transformers causal language model.
        tokenizer: the tokenizer of both models.
        text: what to predict.
        teacher: another model to compare with, or None.
        window: tokens in each of the non-overlapping windows.
        limit: windows to evaluate at most, from the start of the text.
        batch_size: windows in one forward pass.
        progress: called after each pass, for each model in turn.

    Raises:
        ValueError: as `cut_windows` and `window_nlls`.
    """
    windows = cut_windows(tokenizer, text, window, limit)
    student_nlls = window_nlls(model, windows, batch_size=batch_size, progress=progress)
    if teacher is None:
        return summarise(student_nlls)
    return summarise(student_nlls, window_nlls(teacher, windows, batch_size=batch_size, progress=progress))


def cut_windows(tokenizer, text: str, window: int = 1024, limit: int | None = None) -> Tensor:
    """The text's tokens, without special tokens, in non-overlapping windows; an incomplete last one is dropped.

    Returns:
        int64 `[windows, window]`.

    Raises:
        ValueError: the text is shorter than one window, or `window` or `limit` too small.
    """
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 window, got {limit}")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // window
    if count == 0:
        remedy = f"use a longer text or a window of at most {len(tokens)}" if len(tokens) > 1 else "use a longer text"
        raise ValueError(f"the text has {len(tokens)} tokens, less than one window of {window}: {remedy}")
    count = count if limit is None else min(count, limit)
    return torch.tensor(tokens[: count * window]).view(count, window)


@torch.no_grad()
def window_nlls(model, windows: Tensor, *, batch_size: int = 1, progress: Progress | None = None) -> Tensor:
    """Negative log-likelihood of each window's tokens 1 … window-1, by the position they are predicted from.

    Args:
        model: a transformers causal language model; evaluated in eval mode and left as it was.
        windows: tokens, `[windows, window]`.
        batch_size: windows in one forward pass.
        progress: called after each pass.

    Returns:
        fp64 `[windows, window - 1]` on the CPU, in nats.

    Raises:
        ValueError: a token is outside the model's vocabulary, or the model's output is not finite.
    """
    if windows.max() >= model.config.vocab_size:
        raise ValueError(
            f"the text has token {int(windows.max())}, but the model's vocabulary only {model.config.vocab_size} "
            "tokens: this tokenizer belongs to another model"
        )
    was_training = model.training
    model.eval()
    try:
        parts = []
        for batch in windows.split(batch_size):
            parts.append(_batch_nlls(model, batch.to(model.device)))
            if progress is not None:
                progress(sum(map(len, parts)), len(windows))
    finally:
        model.train(was_training)
    nlls = torch.cat(parts)
    if not nlls.isfinite().all():
        bad = int((~nlls.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"the model's output is not finite in window {bad}: check its weights, or try dtype float32")
    return nlls


def _batch_nlls(model, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits  # [B, T, V]
    targets = tokens[:, 1:]
    # A few positions at a time: the logits of a whole window in fp32 can be larger than the model.
    parts = [
        F.cross_entropy(logits[:, at : at + target.shape[1]].float().mT, target, reduction="none").double().cpu()
        for at, target in zip(
            range(0, targets.shape[1], POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE, dim=1), strict=True
        )
    ]
    return torch.cat(parts, dim=1)


def summarise(student_nlls: Tensor, teacher_nlls: Tensor | None = None) -> PerplexityReport:
    """The report on negative log-likelihoods, as `window_nlls` gives them.

    Args:
        student_nlls: `[windows, window - 1]`.
        teacher_nlls: the teacher's for the same windows, or None.

    Raises:
        ValueError: the two differ in shape.
    """
    if teacher_nlls is not None and teacher_nlls.shape != student_nlls.shape:
        raise ValueError(
            f"student and teacher must be evaluated on the same windows, got negative log-likelihoods of shape "
            f"{list(student_nlls.shape)} and {list(teacher_nlls.shape)}"
        )
    windows, queries = student_nlls.shape
    ranges = _band_ranges(queries + 1)
    edges = torch.linspace(0, queries, min(CURVE_BUCKETS, queries) + 1).long().tolist()
    buckets = [(start, end - 1) for start, end in pairwise(edges)]

    def mean(nlls: Tensor | None, start: int, end: int) -> Tensor | None:
        return None if nlls is None else nlls[:, start : end + 1].double().mean()

    def band(start: int, end: int, figure: Callable[[Tensor], Tensor]) -> Band:
        means = (mean(nlls, start, end) for nlls in (student_nlls, teacher_nlls))
        return Band(start, end, *(None if x is None else figure(x).item() for x in means))

    return PerplexityReport(
        windows=windows,
        window=queries + 1,
        overall=band(0, queries, torch.exp),
        bands=[band(start, end, torch.exp) for start, end in ranges],
        per_position=[band(start, end, torch.clone) for start, end in buckets],
    )


def _band_ranges(window: int) -> list[tuple[int, int]]:
    """0–63, 64–255, 256–511, and on by doubling, cut to the window.

    A window's last token is predicted and predicts nothing, so a band that would hold it alone is left out.
    """
    edges = [0, 64, 256]
    while edges[-1] < window:
        edges.append(edges[-1] * 2)
    bands = pairwise(edges)
    return [(start, min(end, window) - 1) for start, end in bands if start < window - 1]


def render(report: PerplexityReport, title: str = "Perplexity") -> Table:
    """The report as a table for a terminal."""
    caption = f"{report.windows} windows of {report.window:,} tokens, {report.tokens:,} tokens predicted"
    table = Table(title=title, caption=caption, min_width=len(caption))
    table.add_column("position")
    columns = ["student"] if report.overall.teacher is None else ["student", "teacher", "ratio"]
    for column in columns:
        table.add_column(column, justify="right")
    for band in report.bands:
        table.add_row(f"{band.start}–{band.end}", *_figures(band))
    table.add_section()
    table.add_row("all", *_figures(report.overall), style="bold")
    return table


def _figures(band: Band) -> list[str]:
    if band.teacher is None:
        return [f"{band.student:,.2f}"]
    return [f"{band.student:,.2f}", f"{band.teacher:,.2f}", f"{band.ratio:.3f}"]
