import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from t2r.training.config import DataConfig
from t2r.training.data import PackedRows, Tokens, collate, tokenise
from tests.training.tiny import documents, save_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("T2R_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


def test_documents_one_after_another(tmp_path, tokenizer):
    texts = documents(5)
    tokens = tokenise(DataConfig(files=[write(tmp_path / "a.jsonl", texts)]), tokenizer)
    for text, start, end in zip(texts, tokens.bounds[:-1], tokens.bounds[1:], strict=True):
        assert tokens.ids[start : end - 1].tolist() == tokenizer(text)["input_ids"]
        assert tokens.ids[end - 1] == tokenizer.eos_token_id


def test_kinds_of_files_together(tmp_path, tokenizer):
    (tmp_path / "b.txt").write_text("the cat\n\nsat on a mat")
    rows = write(tmp_path / "a.jsonl", ["some dogs"], column="body")
    parquet = tmp_path / "c.parquet"
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["run far", "away"]}), parquet)
    tokens = tokenise(DataConfig(files=[rows, str(tmp_path / "b.txt"), str(parquet)], column="body"), tokenizer)
    words = tokenizer.convert_ids_to_tokens(tokens.ids.tolist())
    assert " ".join(words) == "some dogs </s> the cat sat on a mat </s> run far </s> away </s>"


def test_cached_until_text_or_tokenizer_change(tmp_path, tokenizer, cache):
    file = write(tmp_path / "a.jsonl", documents(5))
    first = tokenise(DataConfig(files=[file]), tokenizer)
    assert len(list(cache.iterdir())) == 1
    tokenizer_calls = []
    again = tokenise(DataConfig(files=[file]), _Spy(tokenizer, tokenizer_calls))
    assert not tokenizer_calls
    assert np.array_equal(first.ids, again.ids)
    write(tmp_path / "a.jsonl", documents(6))
    assert len(tokenise(DataConfig(files=[file]), tokenizer).bounds) == 7


def test_the_cache_tells_files_apart(tmp_path, tokenizer):
    for name, text in (("x.txt", "the cat"), ("y.txt", " sat"), ("xy.txt", "the cat sat")):
        (tmp_path / name).write_text(text)
    apart = tokenise(DataConfig(files=[str(tmp_path / "x.txt"), str(tmp_path / "y.txt")]), tokenizer)
    together = tokenise(DataConfig(files=[str(tmp_path / "xy.txt")]), tokenizer)
    assert (len(apart.bounds), len(together.bounds)) == (3, 2)
    rows = tmp_path / "a.jsonl"
    tokenise(DataConfig(files=[write(rows, ["the", "cat"])]), tokenizer)
    rows.rename(tmp_path / "a.txt")
    assert len(tokenise(DataConfig(files=[str(tmp_path / "a.txt")]), tokenizer).bounds) == 2


def test_two_runs_at_once_share_the_cache(tmp_path, tokenizer, cache, monkeypatch):
    file = write(tmp_path / "a.jsonl", documents(5))
    save = np.save

    def another_is_quicker(*args):
        monkeypatch.setattr(np, "save", save)
        tokenise(DataConfig(files=[file]), tokenizer)
        save(*args)

    monkeypatch.setattr(np, "save", another_is_quicker)
    assert len(tokenise(DataConfig(files=[file]), tokenizer).bounds) == 6
    assert len(list(cache.iterdir())) == 1  # and nothing half-written beside it


class _Spy:
    def __init__(self, tokenizer, calls):
        self.tokenizer, self.calls = tokenizer, calls

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        return self.tokenizer(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "no such file"),
        ("a.txt", b"", "empty"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not readable as json"),
        ("a.jsonl", b"{oops\n", "not readable as json"),
        ("a.jsonl", b'{"body": "x"}\n', "no column 'text'; it has body"),
        ("a.jsonl", b'{"text": 5}\n', "holds int64, not text"),
        ("a.jsonl", b'{"text": ["a", "b"]}\n', "not text. Set data.column"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', "a.jsonl: "),
        ("a.csv", b"a,b\n", "not .csv"),
        ("a.jsonl", b'{"text": ""}\n', "hold no text"),
    ],
)
def test_bad_files_are_named(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokenise(DataConfig(files=[str(tmp_path / name)]), tokenizer)


def rows_of(lengths, sequence_length):
    bounds = np.cumsum([0, *lengths])
    return PackedRows(Tokens(np.arange(100, 100 + bounds[-1], dtype=np.int32), bounds), sequence_length)


def test_rows_know_where_documents_begin():
    rows = rows_of([3, 5, 8, 1, 4], 8)
    assert len(rows) == 2
    assert rows[0]["input_ids"].tolist() == list(range(100, 108))
    assert rows[0]["starts"].tolist() == [0, 3]
    assert rows[1]["starts"].tolist() == [0]  # the third document fills it exactly
    assert rows_of([3, 5, 7, 1, 4], 8)[1]["starts"].tolist() == [0, 7]
    assert rows_of([12, 6], 8)[1]["starts"].tolist() == [0, 4]  # the cut document goes on as one of its own


def test_a_batch_is_one_row_in_which_no_document_predicts_another():
    rows = rows_of([3, 5, 2, 6], 8)
    batch = collate([rows[0], rows[1]])
    assert batch["cu_seqlens"].tolist() == [0, 3, 8, 10, 16]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["input_ids"].tolist() == [list(range(100, 116))]
    expected = batch["input_ids"].clone()
    expected[0, [0, 3, 8, 10]] = -100
    assert torch.equal(batch["labels"], expected)


def test_too_little_text():
    with pytest.raises(ValueError, match="5 tokens, less than one row of 8"):
        rows_of([5], 8)
