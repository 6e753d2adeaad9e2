"""Teachers: the softmax attention that a student came from, in its own frozen weights or in a model of its own."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import is_bitsandbytes_available

from t2r.model import T2RForCausalLM
from t2r.training.adapters import adapters_in, base_of, switched
from t2r.training.config import StageConfig, TrainConfig
from t2r_conversion.fla_config import GSA


class Teacher(Protocol):
    """What a student learns from."""

    def active(self, student: T2RForCausalLM | PeftModel) -> Iterator[T2RForCausalLM]:
        """A context that gives the network to run, without gradients."""


class OwnTeacher:
    """The teacher that a student with adapters carries in itself: frozen weights, adapters off, softmax attention."""

    def __init__(self):
        self.student: PeftModel | None = None
        self.adapters: list[nn.Module] = []

    @contextmanager
    def active(self, student: PeftModel) -> Iterator[T2RForCausalLM]:
        """See `Teacher`."""
        base = student.get_base_model()
        if self.student is not student:  # to look for them takes longer than a small model's forward pass
            self.student, self.adapters = student, adapters_in(student)
        with torch.no_grad(), switched(self.adapters, on=False), base.softmax_attention():
            yield base


class SeparateTeacher:
    """A converted model that is not trained, with softmax attention.

    Args:
        model: like the student before its training.
    """

    def __init__(self, model: T2RForCausalLM):
        self.model = model.requires_grad_(False).eval()

    @contextmanager
    def active(self, student: T2RForCausalLM | PeftModel) -> Iterator[T2RForCausalLM]:  # noqa: ARG002
        """See `Teacher`."""
        with torch.no_grad(), self.model.softmax_attention():
            yield self.model


def way_into(teacher: T2RForCausalLM, student: T2RForCausalLM | PeftModel, sharded: bool) -> nn.Module:
    """What to call for a teacher's forward pass: the whole student, if it is in there and its weights are sharded
    (FSDP2), since only the outermost module gathers them all."""
    return student if sharded and teacher is base_of(student) else teacher


def needs_separate_teacher(config: TrainConfig) -> bool:
    """Whether a run changes the weights that the teacher would be made of."""
    return config.trains == "full"


def check_teacher(config: TrainConfig, stages: Iterable[StageConfig], record: dict) -> None:
    """Refuse a teacher that cannot be had.

    Args:
        config: of the run.
        stages: of the run.
        record: the model's.

    Raises:
        ValueError: it is to be quantised, and there is no bitsandbytes that transformers can use; or the model never
            had softmax attention to learn from.
    """
    learning = [stage.loss for stage in stages if stage.loss.align or stage.loss.distill]
    if learning and record.get("conversion", {}).get("family") == GSA.model_type:
        raise ValueError(
            f"{config.model}: comes from flash-linear-attention, so it has no softmax attention to learn from; train "
            "it on text alone (loss: {distill: 0, cross_entropy: 1})"
        )
    if config.teacher_bits and not is_bitsandbytes_available():
        raise ValueError(
            f"teacher_bits: {config.teacher_bits} needs bitsandbytes; install it (pip install -U bitsandbytes)"
        )


def describe_teacher(config: TrainConfig) -> str:
    """Which teacher a run has, in words."""
    if needs_separate_teacher(config):
        bits = f" in {config.teacher_bits} bits" if config.teacher_bits else ""
        return f"a second copy of the model{bits}, frozen, with softmax attention: everything trains in the first"
    return "the student's own frozen weights: adapters off, softmax attention"
