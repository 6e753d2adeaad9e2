"""Perplexity of student and teacher before, while and after a run goes on, on the same windows."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import TrainerCallback

from t2r.evaluation import PerplexityReport, cut_windows, read_text, render, summarise, window_nlls
from t2r.training.config import EvalConfig
from t2r.training.sharded import is_sharded
from t2r.training.teachers import Teacher, way_into
from t2r.training.trainer import T2RTrainer


class Evaluator:
    """Evaluates a student and its teacher; the teacher once.

    Args:
        config: which text, and how much of it.
        tokenizer: of both.
        model: the student.
        teacher: its teacher.
        state: this process among those that share the windows.

    Raises:
        ValueError: the text is missing, not UTF-8, or shorter than one window.
    """

    def __init__(self, config: EvalConfig, tokenizer, model: torch.nn.Module, teacher: Teacher, state: PartialState):
        self.config, self.model, self.teacher, self.state = config, model, teacher, state
        self.windows = cut_windows(tokenizer, read_text(config.text), config.window, config.limit)
        self.teacher_nlls: Tensor | None = None

    def before(self) -> dict:
        """The record's `evaluation` entries of the untrained student: settings, `before`, and its curve."""
        settings = {"text": self.config.text.rsplit("/")[-1], "window": self.config.window}
        return settings | self._report("before")

    def after(self) -> dict:
        """The record's `evaluation` entries of the trained student."""
        return self._report("after")

    def prepare(self) -> None:
        """Evaluate the teacher, if it has not been yet."""
        self._of_teacher()

    def at(self, step: int) -> dict:
        """Where the student stands after a step: `step`, and the perplexities of `student` and `teacher`."""
        found = summarise(self._of_student(), self._of_teacher()).overall
        if self.state.is_main_process:
            text = f"step {step} · perplexity {found.student:.2f}, {found.ratio:.3f} × the teacher's"
            Console(stderr=True).print(text, highlight=False)
        return {"step": step, "student": found.student, "teacher": found.teacher, "ratio": found.ratio}

    def _report(self, stage: str) -> dict:
        reference = self._of_teacher()
        report = summarise(self._of_student(f"student, {stage}"), reference)
        if self.state.is_main_process:
            Console().print(render(report, f"Perplexity {stage} the finetune"))
        return {stage: report.as_dict(), f"{stage}_curve": _curve(report)}

    def _of_student(self, label: str | None = None) -> Tensor:
        return self._nlls(self.model, label)

    def _of_teacher(self) -> Tensor:
        if self.teacher_nlls is None:
            with self.teacher.active(self.model) as base:
                self.teacher_nlls = self._nlls(way_into(base, self.model, is_sharded(self.model)), "teacher")
        return self.teacher_nlls

    def _nlls(self, model: torch.nn.Module, label: str | None) -> Tensor:
        """Of all windows, each process having computed its share."""
        count, processes = len(self.windows), self.state.num_processes
        share = -(-count // processes)  # the same for all, since sharded weights need all of them in each pass
        mine = (torch.arange(share) * processes + self.state.process_index) % count
        with self._watched(label, share) as progress:
            nlls = window_nlls(model, self.windows[mine], progress=progress)
        if processes == 1:
            return nlls
        everything = gather(nlls.to(self.state.device)).cpu()  # [processes * share, window - 1]
        return everything.view(processes, share, -1).transpose(0, 1).flatten(0, 1)[:count]

    @contextmanager
    def _watched(self, label: str | None, windows: int) -> Iterator[Callable[[int, int], None] | None]:
        console = Console(stderr=True)
        if label is None or not self.state.is_main_process:
            yield None
        elif not console.is_terminal:
            console.print(f"evaluating {label}: {len(self.windows)} windows", highlight=False)
            yield None
        else:
            with Progress(console=console, transient=True) as progress:
                task = progress.add_task(f"evaluate {label}", total=windows)
                yield lambda done, _: progress.update(task, completed=done)


class EvaluateEvery(TrainerCallback):
    """Evaluates now and then while a run goes on.

    Args:
        evaluator: how.
        every: steps between two evaluations, counted over all stages.
        keep: is given the figures of each.
    """

    def __init__(self, evaluator: Evaluator, every: int, keep: Callable[[dict], None]):
        self.evaluator, self.every, self.keep = evaluator, every, keep
        self.steps_before, self.trainer = 0, None

    def begin(self, trainer: T2RTrainer) -> None:
        """Say whose stage comes."""
        self.steps_before, self.trainer = trainer.stage.steps_before, trainer

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        """Evaluate if it is time."""
        step = self.steps_before + state.global_step
        if step % self.every == 0:
            began = time.perf_counter()
            self.keep(self.evaluator.at(step))
            self.trainer.leave_out(time.perf_counter() - began)


def _curve(report: PerplexityReport) -> list[dict]:
    """Mean negative log-likelihoods by range of positions, for plots."""
    return [band.as_dict() for band in report.per_position]
