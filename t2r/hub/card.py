"""A model card from what a model folder records about itself. What was not recorded is not said."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from t2r.hub.facts import ModelFacts, model_facts
from t2r.model import SLOT_ATTENTION

CARD = "README.md"
MARK = "<!-- Written by t2r from t2r_record.json. Delete this line to keep a card of your own. -->"
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(?<!\.gguf)")
PAPER = "[Gated Slot Attention](https://arxiv.org/abs/2409.07146)"
_KINDS = {
    "linear_attention": "Gated Slot Attention",
    "hybrid_sliding": "Gated Slot Attention beside a softmax window",
    "full_attention": "softmax attention",
    "sliding_attention": "sliding-window softmax attention",
}
TAGS = ["t2r", "gated-slot-attention", "linear-attention", "recurrent"]
STAGE = {
    "stage": "stage",
    "steps": "steps",
    "tokens": "tokens",
    "sequence length": "sequence_length",
    "trains": "trains",
    "objective": "objective",
}


def build_card(folder: str | Path, repo: str | None = None) -> ModelCard:
    """The model card of a model folder, from its configuration, weight headers and `t2r_record.json`.

    Args:
        folder: a model folder.
        repo: the repository it goes to, "owner/name"; the folder's name stands in when not given.

    Raises:
        ValueError: this is no model folder, or a file in it is damaged.
    """
    return card_of(model_facts(folder), repo or Path(folder).resolve().name)


def card_of(facts: ModelFacts, repo: str, base: str | None = None) -> ModelCard:
    """The card of a model that these facts are of; or, with a base, of the adapter that makes it of that."""
    sections = [
        MARK,
        _summary(facts, repo),
        _usage(repo) if base is None else _adapter_usage(repo, base),
        _conversion(facts),
        _training(facts),
        _evaluation(facts),
        _limits(facts),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{_metadata(facts, repo, base).to_yaml()}\n---\n\n{body}\n")


def own_card(folder: str | Path) -> ModelCard | None:
    """The card in a folder if someone wrote it by hand; None if there is none or t2r wrote it."""
    path = Path(folder) / CARD
    if not path.is_file() or MARK in path.read_text(encoding="utf-8"):
        return None
    return ModelCard.load(path)


def _metadata(facts: ModelFacts, repo: str, base: str | None) -> ModelCardData:
    conversion = facts.record.get("conversion", {})
    results = _eval_results(facts)
    return ModelCardData(
        base_model=base or hub_id(conversion.get("source")),
        base_model_relation="adapter" if base else None,
        license=conversion.get("license"),
        library_name="t2r",
        pipeline_tag="text-generation",
        tags=TAGS,
        eval_results=results,
        model_name=repo.split("/")[-1] if results else None,
    )


def _eval_results(facts: ModelFacts) -> list[EvalResult] | None:
    """The last perplexity recorded, in the form that the Hub shows beside the card."""
    evaluation = facts.record.get("evaluation", {})
    last = evaluation.get("after") or evaluation.get("before")
    if not last:
        return None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=evaluation.get("text", "held-out text"),
            metric_type="perplexity",
            metric_name="Perplexity",
            metric_value=last["student"],
        )
    ]


def _summary(facts: ModelFacts, repo: str) -> str:
    source = facts.record.get("conversion", {}).get("source")
    origin = "a pretrained softmax Transformer"
    if source:
        origin = f"[{source}](https://huggingface.co/{source})" if hub_id(source) else f"`{Path(source).name}`"
    return (
        f"# {repo.split('/')[-1]}\n\n"
        f"A recurrent language model made from {origin}: {_layers(facts)}. Converted with `t2r`."
    )


def _layers(facts: ModelFacts) -> str:
    total = sum(facts.layers.values())
    converted = sum(facts.layers.get(kind, 0) for kind in SLOT_ATTENTION)
    which = f"all {total} layers" if converted == total else f"{converted} of its {total} layers"
    beside = "" if facts.window is None else f" beside a softmax window of {facts.window} tokens"
    memory = ", whose memory does not grow" if converted == total else ""
    if facts.record.get("conversion", {}).get("family") == "gsa":
        return f"as there, {which} are {PAPER}{memory}"
    return f"the softmax attention of {which} is replaced by {PAPER}{beside}{memory}"


def _usage(repo: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo}", trust_remote_code=True)
```

This runs the code in this repository, in PyTorch. With `pip install t2r` it is t2r's own, with Triton kernels on a GPU;
after `import t2r`, `trust_remote_code` is not needed. From a shell: `t2r generate {repo} --prompt "Hello"`"""


def _adapter_usage(repo: str, base: str) -> str:
    return f"""## Use

These are adapters and added parameters: the model itself is made of them and [{base}](https://huggingface.co/{base}).

```
pip install t2r
```

```python
from t2r.model import T2RForCausalLM

model = T2RForCausalLM.from_adapter("{base}", "{repo}")
```

As a folder: `t2r merge {repo} -o OUT`"""


def _conversion(facts: ModelFacts) -> str:
    rows = {
        "Parameters": f"{facts.parameters:,}",
        "Weights": f"{facts.weight_bytes:,} bytes, {facts.dtype}",
        "Layers": ", ".join(f"{count} {_KINDS.get(kind, kind)}" for kind, count in facts.layers.items()),
        "Start": facts.start,
        "Slots of each key/value head": facts.slots_in_words,
        "… of which keep the first tokens at the start": facts.sinks,
        "Tokens of the softmax window beside the slots": facts.window,
        "Recurrent state of one sequence": f"{facts.state_bytes:,} bytes" if facts.state_bytes else None,
    }
    for tokens, size in facts.memory_bytes.items():
        softmax = facts.softmax_bytes[tokens]
        rows[f"State and cache at {tokens:,} tokens"] = f"{size:,} bytes (softmax attention: {softmax:,})"
    return "## Size\n\n" + _table(["", ""], [[name, value] for name, value in rows.items() if value is not None])


def _training(facts: ModelFacts) -> str | None:
    training = facts.record.get("training")
    if not training:
        return None
    named = {name: value for name, value in training.items() if value is not None and name != "stages"}
    tables = [_table(["", ""], [[name.replace("_", " "), _value(value)] for name, value in named.items()])]
    if stages := training.get("stages"):
        tables.append(_table(list(STAGE), [[_value(stage.get(name)) for name in STAGE.values()] for stage in stages]))
    return "\n\n".join(["## Training", *tables])


def _evaluation(facts: ModelFacts) -> str | None:
    evaluation = facts.record.get("evaluation", {})
    stages = [(stage, evaluation[stage]) for stage in ("before", "after") if evaluation.get(stage)]
    if not stages:
        return None
    tables = [f"{_stage_title(stage, report)}\n\n{_bands(report)}" for stage, report in stages]
    text = f"`{evaluation['text']}`" if "text" in evaluation else "held-out text"
    intro = f"Perplexity on {text}, by position in the window; the teacher is the model before conversion."
    return "\n\n".join(["## Evaluation", intro, *tables])


def _stage_title(stage: str, report: dict) -> str:
    size = f"{report['windows']} windows, {report['tokens']:,} tokens predicted"
    return f"{stage.capitalize()} training ({size}):"


def _bands(report: dict) -> str:
    rows = [[f"{band['from']}–{band['to']}", *_figures(band)] for band in report["bands"]]
    return _table(["position", "student", "teacher", "ratio"], [*rows, ["all", *_figures(report)]])


def _figures(row: dict) -> list[str]:
    return ["–" if row[name] is None else f"{row[name]:.{places}f}" for name, places in _PLACES.items()]


_PLACES = {"student": 2, "teacher": 2, "ratio": 3}


def _limits(facts: ModelFacts) -> str:
    lines = []
    if facts.slots:
        beside = "" if facts.window is None else f" and the last {facts.window} tokens"
        lines.append(
            f"- A Gated Slot Attention layer keeps {facts.slots_in_words} slots of each key/value head{beside}, "
            "however long the text: what they no longer hold cannot be looked up word for word."
        )
    if facts.record and not facts.record.get("training"):
        lines.append("- Converted only, not trained since.")
    lines.append("- Knowledge, biases and licence terms are those of the model it was made from.")
    return "## Limits\n\n" + "\n".join(lines)


def hub_id(source: str | None) -> str | None:
    """What is recorded as a source, if that is a model's name on the Hub."""
    return source if source and HUB_ID.fullmatch(source) else None


def _value(value) -> str:
    if isinstance(value, dict):
        return "<br>".join(f"{name}: {_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name  # paths of the machine that it ran on stay there
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
