"""Documents from files and Hub datasets: text, prompt and completion, or chat, with which of their tokens to learn."""

import hashlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedTokenizerBase

from t2r.evaluation.text import read_text
from t2r.training.config import DataConfig, SourceConfig

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# Kinds of rows by their columns, the first that fits; any other row is text.
KINDS = {"chat": ("messages",), "completion": ("prompt", "completion")}


def sources_of(data: DataConfig) -> list[SourceConfig]:
    """The sources that `data.files` lists, complete.

    Raises:
        ValueError: there is none, an entry has an unknown key, or a number is out of range.
    """
    if not data.files:
        raise ValueError("data.files names no file")
    sources = []
    for i, entry in enumerate(data.files):
        entry = {"path": entry} if isinstance(entry, str) else entry
        try:
            source = OmegaConf.to_object(OmegaConf.merge(SourceConfig, entry))
        except OmegaConfBaseException as error:
            raise ValueError(f"data.files.{i}: {str(error).splitlines()[0]}") from error
        if source.weight <= 0 or (source.limit is not None and source.limit < 1):
            raise ValueError(f"data.files.{i}: weight must be positive and limit at least 1")
        sources.append(source)
    return sources


def is_local(source: SourceConfig) -> bool:
    """Whether a source is a file rather than a Hub dataset: it has a suffix that we read, or is there."""
    path = Path(source.path)
    return path.exists() or path.suffix in (*LOADERS, ".txt") or len(path.parts) != 2


def check_source(source: SourceConfig) -> None:
    """Raise ValueError where a file is missing, empty or of another kind; nothing is read."""
    path = Path(source.path)
    if not is_local(source):
        return
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path}: {'the file is empty' if path.is_file() else 'no such file'}")
    if path.suffix not in (*LOADERS, ".txt"):
        raise ValueError(f"{path}: data files are .txt, {', '.join(LOADERS)}, not {path.suffix or 'without a suffix'}")


def fingerprint(source: SourceConfig) -> str:
    """What tells a source's documents from others: a file's content, or a Hub dataset's revision; and the settings."""
    path, digest = Path(source.path), hashlib.sha256()
    if is_local(source):
        digest.update(f"{path.suffix} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        digest.update(f"{source.path} {source.revision or _revision(source.path)}".encode())
    digest.update(f"{source.name} {source.split} {source.column} {source.weight} {source.limit}".encode())
    return digest.hexdigest()


def _revision(dataset: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        return HfApi().dataset_info(dataset).sha
    except (HTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{dataset}: no such file, and the Hub does not give such a dataset ({error})") from error


def load_rows(source: SourceConfig, column: str, seed: int = 0):
    """A source's rows, as often as its weight says: a `datasets.Dataset`, and the kind of its rows.

    Args:
        source: where from.
        column: the text column of rows that are text, unless the source names another.
        seed: of the sample that a fractional weight takes.

    Raises:
        ValueError: the source cannot be read, or has no column that we know.
    """
    import datasets

    rows = _local(source) if is_local(source) else _hub(source)
    if source.limit is not None and source.limit < len(rows):
        rows = rows.select(range(source.limit))
    whole, part = divmod(source.weight, 1)
    sample = rows.shuffle(seed=seed).select(range(round(part * len(rows))))
    if part and not len(sample):
        raise ValueError(f"{source.path}: has too few documents, {len(rows)}, for a weight of {source.weight}")
    copies = [rows] * int(whole) + ([sample] if len(sample) else [])
    rows = rows if source.weight == 1 else datasets.concatenate_datasets(copies)
    kind, columns = _kind(source, rows, source.column or column)
    return rows.select_columns(list(columns)), kind


def _local(source: SourceConfig):
    import datasets

    path = Path(source.path)
    if path.suffix == ".txt":
        return datasets.Dataset.from_dict({source.column or "text": [read_text(path)]})
    try:
        if path.suffix != ".parquet":  # the JSON reader lets broken bytes through
            with path.open(encoding="utf-8") as lines:
                deque(lines, maxlen=0)
        return datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # datasets wraps whatever its readers raise
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{path}: not readable as {LOADERS[path.suffix]} in UTF-8: {cause}") from error


def _hub(source: SourceConfig):
    import datasets

    try:
        if source.limit is None:
            return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
        rows = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=True
        )
        return datasets.Dataset.from_list(list(rows.take(source.limit)))  # only what is wanted is fetched
    except Exception as error:  # whatever the Hub's and the dataset's code raise
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{source.path}: no such file, and not readable as a Hub dataset: {cause}") from error


def _kind(source: SourceConfig, rows, column: str) -> tuple[str, tuple[str, ...]]:
    if source.column is None and Path(source.path).suffix != ".txt":
        for kind, columns in KINDS.items():
            if set(columns) <= set(rows.column_names):
                return kind, columns
    if Path(source.path).suffix == ".txt":
        column = source.column or "text"
    if column not in rows.column_names:
        known = " or ".join(" and ".join(columns) for columns in KINDS.values())
        raise ValueError(
            f"{source.path}: no column {column!r}; it has {', '.join(rows.column_names)}. Set data.column, or "
            f"rename columns to {known}"
        )
    dtype = getattr(rows.features[column], "dtype", None)
    if dtype not in ("string", "large_string"):
        raise ValueError(
            f"{source.path}: column {column!r} holds {dtype or 'lists or objects'}, not text. Set data.column"
        )
    return "text", (column,)


def encoder(kind: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[dict], dict]:
    """What `datasets.map` turns a batch of rows into: `ids`, a document each, and `learn`, 1 for tokens with a loss.

    Raises (when called):
        ValueError: chat without a chat template, or one whose earlier turns change when later ones come.
    """
    end = tokenizer.eos_token_id

    def text(batch):
        texts = [text for text in next(iter(batch.values())) if text]
        ids = tokenizer(texts, verbose=False)["input_ids"] if texts else []  # begins as the model expects it
        ids = [document if document[-1:] == [end] else [*document, end] for document in ids]
        return {"ids": ids, "learn": [[1] * len(document) for document in ids]}

    def completion(batch):
        found = {"ids": [], "learn": []}
        for prompt, answer in zip(batch["prompt"], batch["completion"], strict=True):
            if not prompt or not answer:
                continue
            if isinstance(prompt, list) != isinstance(answer, list):
                raise ValueError("prompt and completion are both text or both messages")
            if isinstance(answer, list):
                _add(found, *_chat([*prompt, *answer], len(prompt), tokenizer))
                continue
            before = tokenizer(prompt, verbose=False)["input_ids"]
            before = before[:-1] if before[-1:] == [end] else before  # some tokenizers end whatever they begin
            after = [*tokenizer(answer, verbose=False, add_special_tokens=False)["input_ids"], end]
            _add(found, before + after, [0] * len(before) + [1] * len(after))
        return found

    def chat(batch):
        found = {"ids": [], "learn": []}
        for messages in filter(None, batch["messages"]):
            _add(found, *_chat(messages, 0, tokenizer))
        return found

    return {"text": text, "completion": completion, "chat": chat}[kind]


def _add(found: dict, ids: list[int], learn: list[int]) -> None:
    if ids:
        found["ids"].append(ids)
        found["learn"].append(learn)


def _chat(messages: list[dict], first: int, tokenizer) -> tuple[list[int], list[int]]:
    """A conversation's tokens; those of the assistant's turns from message `first` on are learnt."""
    if not tokenizer.chat_template:
        raise ValueError("holds conversations, and the model's tokenizer has no chat template")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if i < first or message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True) if i else ""
        until = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (until.startswith(before) and whole.startswith(until)):
            raise ValueError(
                "the chat template writes earlier turns anew when later ones come, so what the "
                "assistant said cannot be told apart; split conversations into prompt and completion"
            )
        spans.append((len(before), len(until)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learn = [int(any(a <= start < b for a, b in spans)) for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], learn
