from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import filter_repo_objects

from t2r.hub import build_card, push
from t2r.model.export import code_files
from tests.tiny import tiny_t2r, write_record

MODEL = sorted(
    [
        *code_files(),
        "README.md",
        "additional_chat_templates/tools.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "report.md",
        "report.png",
        "t2r_record.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    tiny_t2r(folder)
    write_record(folder, conversion={"source": "someone/llama-tiny"})
    for name in ("report.md", "report.png", "notes.txt", ".env", "train.log", "data.jsonl"):
        (folder / name).write_text(name)
    for path in ("old/model.safetensors", "additional_chat_templates/tools.jinja"):
        (folder / path).parent.mkdir()
        (folder / path).write_text(path)
    return folder


class Hub:
    """Stands where HfApi's methods would leave this machine, and keeps what reaches it."""

    def __init__(self, monkeypatch, private=False):
        self.calls, self.private = [], private
        for name in ("create_repo", "repo_info", "create_branch", "upload_folder"):
            monkeypatch.setattr(HfApi, name, lambda api, *args, _name=name, **kwargs: self.take(_name, args, kwargs))

    def take(self, name, args, kwargs):
        self.calls.append((name, args, kwargs))
        if name == "upload_folder":
            return self.receive(**kwargs)
        return SimpleNamespace(private=self.private)

    def receive(self, *, folder_path, allow_patterns, **kwargs):
        paths = [path for path in folder_path.rglob("*") if path.is_file()]
        names = [path.relative_to(folder_path).as_posix() for path in paths]
        self.files = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))
        self.card = (folder_path / "README.md").read_text()
        return SimpleNamespace(commit_url="https://hub/me/tiny/commit/1")

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def test_dry_run_lists_the_model_s_files_and_touches_nothing(folder, monkeypatch):
    hub = Hub(monkeypatch)
    before = sorted(folder.rglob("*"))
    planned = push(folder, "me/tiny", dry_run=True)
    assert [name for name, _ in planned.files] == MODEL
    assert dict(planned.files)["report.md"] == len("report.md")
    assert dict(planned.files)["README.md"] == len(str(planned.card).encode())
    assert str(planned.card) == str(build_card(folder, "me/tiny"))
    assert planned.url is None
    assert hub.calls == []
    assert sorted(folder.rglob("*")) == before


def test_push_uploads_what_the_dry_run_lists(folder, monkeypatch):
    planned = push(folder, "me/tiny", dry_run=True)
    hub = Hub(monkeypatch)
    pushed = push(folder, "me/tiny", revision="v2", commit_message="Again")
    assert hub.files == MODEL
    assert hub.card == str(planned.card)
    assert [(name, (folder / name).stat().st_size) for name in MODEL] == pushed.files == planned.files
    assert hub.named("create_repo") == [(("me/tiny",), {"private": None, "exist_ok": True})]
    assert hub.named("create_branch") == [(("me/tiny",), {"branch": "v2", "exist_ok": True})]
    [(_, upload)] = hub.named("upload_folder")
    assert (upload["repo_id"], upload["revision"], upload["commit_message"]) == ("me/tiny", "v2", "Again")
    assert pushed.url == "https://hub/me/tiny/commit/1"


def test_a_card_made_before_is_made_again_and_a_hand_written_one_is_kept(folder, monkeypatch):
    hub = Hub(monkeypatch)
    push(folder, "me/tiny")
    write_record(folder, conversion={"source": "someone/other"})
    push(folder, "me/tiny")
    assert "someone/other" in hub.card
    mine = "---\nlicense: mit\n---\n# Mine\n"
    (folder / "README.md").write_text(mine)
    push(folder, "me/tiny")
    assert hub.card == (folder / "README.md").read_text() == mine


def test_private_goes_only_to_a_private_repository(folder, monkeypatch):
    public = Hub(monkeypatch, private=False)
    with pytest.raises(ValueError, match="me/tiny: exists and is public"):
        push(folder, "me/tiny", private=True)
    assert not public.named("upload_folder")
    assert not (folder / "README.md").exists()
    hub = Hub(monkeypatch, private=True)
    push(folder, "me/tiny", private=True)
    assert hub.named("create_repo")[0][1]["private"] is True
    assert hub.files == MODEL


def test_a_hub_that_is_not_there(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise HTTPError("no route")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match="me/tiny: the Hub refuses or cannot be reached: no route"):
        push(folder, "me/tiny")
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "checkpoint-10", "trainer_state.json", "rng_state.pth"])
def test_training_state_is_refused(folder, name):
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds training state \({name}\).*t2r merge"):
        push(folder, "me/tiny", dry_run=True)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match="model"):
        push(folder, "me/tiny", dry_run=True)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        push(tmp_path / "none", "me/tiny", dry_run=True)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a finetune run"):
        push(folder, "me/tiny", dry_run=True)


@pytest.mark.parametrize("repo", ["name", "a/b/c", "bad repo!!/x", ""])
def test_names_that_no_repository_has(tmp_path, repo):
    tiny_t2r(tmp_path)
    with pytest.raises(ValueError, match="give OWNER/NAME"):
        push(tmp_path, repo, dry_run=True)
