"""What a training run can be told, typed; `t2r.training.recipe` reads it from YAML."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class SourceConfig:
    """One source of documents. Rows with `messages` are chats, of which what the assistant says is learnt; rows with
    `prompt` and `completion` teach the completion; any other row is text.

    Attributes:
        path: a `.txt` (one document), `.jsonl`, `.json` or `.parquet` file, or a dataset's Hub id.
        name: of a Hub dataset's configuration.
        split: of a Hub dataset.
        revision: of a Hub dataset: a commit. With it, tokens in the cache are found without asking the Hub.
        column: makes the rows text, held by this column.
        weight: how often the source is gone through in one pass over the data; of a fraction, a sample.
        limit: documents at most; of a Hub dataset only these are fetched.
    """

    path: str = MISSING
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    weight: float = 1.0
    limit: int | None = None


@dataclass
class DataConfig:
    """What is learnt from.

    Attributes:
        files: paths of files or ids of Hub datasets, or mappings with the keys of `SourceConfig`.
        column: the column that holds the text, in rows that are text.
        sequence_length: tokens of a row; documents are packed into rows and cut where a row ends.
    """

    files: list[Any] = MISSING
    column: str = "text"
    sequence_length: int = 1024


@dataclass
class LoraConfig:
    """The adapters on the source's own projections (PEFT's LoRA).

    Attributes:
        r: rank.
        alpha: the update is scaled by `alpha / r`.
        dropout: on the adapters' input.
        targets: names of the linear layers that get one.
        options: more of PEFT's `LoraConfig`, as `{use_dora: true}` or `{use_rslora: true}`.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossConfig:
    """What is minimised: a weighted sum, per predicted token.

    Attributes:
        align: weight of the alignment of each layer: how far its output is from that of the teacher's softmax
            attention on the teacher's own hidden states, relative to that output's size, squared. By itself only.
        distill: weight of the KL divergence from the teacher.
        cross_entropy: weight of the cross-entropy with the text.
        temperature: of both models in the KL divergence, which is scaled by its square.
        direction: `forward`, KL(teacher, student), covers all that the teacher would say; `reverse`, KL(student,
            teacher), avoids what it would not say.
        top_k: only the teacher's this many likeliest tokens by themselves, all others as one. None for all.
    """

    align: float = 0.0
    distill: float = 1.0
    cross_entropy: float = 0.0
    temperature: float = 1.0
    direction: str = "forward"
    top_k: int | None = None


@dataclass
class OptimConfig:
    """AdamW.

    Attributes:
        lr: peak learning rate of the adapters, or of the source's weights where everything trains.
        gate_lr: peak learning rate of the parameters that conversion added; they want 5 to 20 times `lr`.
        router_lr: peak learning rate of the routers, which say what slots are taken over (routed start); unset: 0.86
            over the hidden size, 1.5e-3 for SmolLM2-135M. 0 leaves them as they were fitted. No weight decay.
        schedule: a transformers schedule: cosine, linear, constant_with_warmup, ...
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: on what `lr` is for; the added parameters have none.
        max_grad_norm: gradients are clipped to this norm.
        eps: keeps steps small where gradients are smaller than it: lower than 1e-8 for gates that hold firmly.
    """

    lr: float = 1e-3
    gate_lr: float = 1e-2
    router_lr: float | None = None
    schedule: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eps: float = 1e-8


@dataclass
class EvalConfig:
    """Perplexity of student and teacher before and after (and `every` so often), on a text that is not trained on.

    Attributes:
        text: a UTF-8 text file; none for no evaluation.
        every: also after each so many steps, counted over all stages; none for not.
        window: tokens of each non-overlapping window.
        limit: windows at most.
    """

    text: str | None = None
    every: int | None = None
    window: int = 1024
    limit: int | None = 32


@dataclass
class StageConfig:
    """One stage of a run. What an entry of `stages` leaves out is as at the recipe's top.

    Attributes:
        stage: `align`, `distill` or `finetune` (cross-entropy); sets the weights of `loss`.
        steps: optimizer steps.
        tokens: in place of `steps`: as many steps as it takes to see these many tokens.
        sequence_length: tokens of a row.
        batch_size: rows in one forward pass, per process.
        gradient_accumulation: forward passes to an optimizer step.
        trains: `lora` (the adapters, and the parameters that conversion added), `gates` (the latter alone) or `full`
            (everything). `lora` and `full` do not go together in one run.
        loss: the objective.
        optim: the optimizer; its schedule runs over the stage.
    """

    stage: str = "distill"
    steps: int | None = None
    tokens: int | None = None
    sequence_length: int = 1024
    batch_size: int = 1
    gradient_accumulation: int = 1
    trains: str = "lora"
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class TrainConfig:
    """A run of one stage, or of the several that `stages` lists.

    Attributes:
        model: a converted model: a folder or a Hub id.
        output: folder of the run.
        data: what is learnt from.
        lora: the adapters.
        loss: the objective.
        optim: the optimizer.
        eval: perplexity before and after.
        stages: what each stage does otherwise, by the keys of `StageConfig`; empty for a single stage.
        trains: `lora`, `gates` or `full`, see `StageConfig`. With `full`, the teacher is a model of its own.
        steps: optimizer steps.
        tokens: in place of `steps`: as many steps as it takes to see these many tokens.
        batch_size: rows in one forward pass, per process.
        gradient_accumulation: forward passes to an optimizer step.
        save_every: steps between checkpoints.
        save_limit: checkpoints kept.
        log_every: steps between log lines.
        seed: of adapters, data order and dropout.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        use_liger_kernel: norms, rotary embedding and SwiGLU as liger-kernel fuses them; unset: where it is installed
            and there is a GPU.
        torch_compile: compile the decoder layers; the first steps then take a minute. Not of `align`.
        cuda_graphs: replay each step's forward and backward pass as a CUDA graph; unset: where that serves, with a
            model of up to 2 billion parameters on one GPU. Not with `gradient_checkpointing`.
        dtype: of the frozen weights: float32, bfloat16, or auto (bfloat16 on CUDA, with autocast; else float32).
        teacher_bits: of a separate teacher's weights (`trains: full`): 8 or 4, through bitsandbytes; None for `dtype`.
        report_to: trackers that transformers knows (tensorboard, wandb, ...).
    """

    model: str = MISSING
    output: str = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stages: list[Any] = field(default_factory=list)
    trains: str = "lora"
    steps: int | None = None
    tokens: int | None = None
    batch_size: int = 1
    gradient_accumulation: int = 1
    save_every: int = 500
    save_limit: int = 2
    log_every: int = 10
    seed: int = 0
    gradient_checkpointing: bool = False
    use_liger_kernel: bool | None = None
    torch_compile: bool = False
    cuda_graphs: bool | None = None
    dtype: str = "auto"
    teacher_bits: int | None = None
    report_to: list[str] = field(default_factory=list)
