"""What a push sends, against a Hub on this machine that huggingface_hub talks to over HTTP."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from t2r.hub import build_card, push
from t2r.model.export import AUTO_MAP, code_files
from tests.hub.loopback import TOKEN, loopback
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
    for name in ("report.md", "report.png", "notes.txt", "notes.py", ".env", "train.log", "data.jsonl"):
        (folder / name).write_text(name)
    for path in ("old/model.safetensors", "additional_chat_templates/tools.jinja"):
        (folder / path).parent.mkdir()
        (folder / path).write_text(path)
    return folder


@pytest.fixture
def hub(monkeypatch):
    with loopback() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_dry_run_lists_the_model_s_files_and_touches_nothing(folder, hub):
    before = sorted(folder.rglob("*"))
    planned = push(folder, "me/tiny", dry_run=True)
    assert [name for name, _ in planned.files] == MODEL
    assert dict(planned.files)["report.md"] == len("report.md")
    assert dict(planned.files)["README.md"] == len(str(planned.card).encode())
    assert str(planned.card) == str(build_card(folder, "me/tiny"))
    assert planned.url is None
    assert hub.requests == []
    assert sorted(folder.rglob("*")) == before


def test_push_uploads_what_the_dry_run_lists(folder, hub):
    before = sorted(folder.rglob("*"))
    planned = push(folder, "me/tiny", dry_run=True)
    pushed = push(folder, "me/tiny", revision="v2", commit_message="Again")
    there = hub.files("me/tiny", "v2")
    assert [(name, len(there[name])) for name in MODEL] == pushed.files == planned.files
    assert there.keys() - set(MODEL) == {".gitattributes"}
    for name in set(MODEL) - {"README.md"}:
        assert there[name] == (folder / name).read_bytes()
    assert there["README.md"].decode() == str(planned.card)
    assert sorted(folder.rglob("*")) == before
    last = hub.repos["me/tiny"].commit("v2")
    assert last.title == "Again"
    assert pushed.url == f"{hub.url}/me/tiny/commit/{last.oid}"
    assert hub.files("me/tiny", "main").keys() == {".gitattributes"}


def test_an_update_sends_what_has_changed(folder, hub):
    push(folder, "me/tiny")
    write_record(folder, conversion={"source": "someone/other"})
    push(folder, "me/tiny")
    assert "someone/other" in hub.files("me/tiny")["README.md"].decode()
    assert hub.count("PUT", "/lfs/") == 2  # weights and picture, once
    assert len(hub.repos["me/tiny"].branches["main"]) == 3
    push(folder, "me/tiny")
    assert len(hub.repos["me/tiny"].branches["main"]) == 3


def test_a_hand_written_card_is_kept(folder, hub):
    mine = "---\nlicense: mit\n---\n# Mine\n"
    (folder / "README.md").write_text(mine)
    push(folder, "me/tiny")
    assert hub.files("me/tiny")["README.md"].decode() == mine


def test_weights_of_an_earlier_push_go(folder, hub):
    push(folder, "me/tiny")
    hub.repos["me/tiny"].branches["main"][-1].files["notes.md"] = b"written on the Hub"
    (folder / "model.safetensors").unlink()
    tiny_t2r(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    push(folder, "me/tiny")
    there = hub.files("me/tiny")
    assert "model.safetensors" not in there
    assert "notes.md" in there
    assert {name for name in there if name.endswith(".safetensors")} == {x.name for x in folder.glob("*.safetensors")}


def test_a_model_saved_before_models_brought_code_gets_it(folder, hub):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in code_files():
        (folder / name).unlink()
    push(folder, "me/tiny")
    there = hub.files("me/tiny")
    assert json.loads(there["config.json"]) == config | {"auto_map": AUTO_MAP}
    assert {name: there[name].decode() for name in code_files()} == code_files()


def test_private_goes_only_to_a_private_repository(folder, hub):
    push(folder, "me/public")
    with pytest.raises(ValueError, match="me/public: exists and is public"):
        push(folder, "me/public", private=True)
    assert len(hub.repos["me/public"].branches["main"]) == 2
    push(folder, "me/secret", private=True)
    push(folder, "me/secret", private=True)
    assert hub.repos["me/secret"].private


def test_a_passing_fault_is_tried_again(folder, hub):
    hub.failures = [("PUT", "/lfs/", 500)]
    push(folder, "me/tiny")
    assert not hub.failures
    assert hub.count("PUT", "/lfs/") == 3
    assert hub.files("me/tiny")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_push_goes_on_where_another_failed(folder, hub):
    picture = (folder / "report.png").read_bytes()
    hub.failures = [("POST", "/commit/", 403)]
    with pytest.raises(ValueError, match=r"me/tiny: the Hub refuses .*403.*only what has not arrived"):
        push(folder, "me/tiny")
    assert sorted(hub.blobs.values()) == sorted([picture, (folder / "model.safetensors").read_bytes()])
    del hub.blobs[next(oid for oid, data in hub.blobs.items() if data == picture)]
    sent = hub.count("PUT", "/lfs/")
    hub.failures = [("PUT", "/lfs/", 403)]
    with pytest.raises(ValueError, match=r"me/tiny: the Hub refuses .*403"):
        push(folder, "me/tiny")
    push(folder, "me/tiny")
    assert hub.count("PUT", "/lfs/") == sent + 2  # the picture alone: refused, then taken
    assert hub.files("me/tiny").keys() >= set(MODEL)


def test_a_hub_that_is_not_there_or_wants_another_token(folder, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match=r"me/tiny: the Hub refuses or cannot be reached: .*401"):
        push(folder, "me/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="me/tiny: the Hub refuses or cannot be reached"):
        push(folder, "me/tiny")


@pytest.mark.parametrize("name", ["optimizer.pt", "checkpoint-10", "trainer_state.json", "rng_state.pth"])
def test_training_state_is_refused(folder, name):
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds training state \({name}\).*t2r merge"):
        push(folder, "me/tiny", dry_run=True)


@pytest.mark.parametrize("name", ["tokens-0123abc", "token", "stored_tokens"])
def test_tokens_are_refused(folder, name):
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"holds tokens \({name}\).*move them away"):
        push(folder, "me/tiny", dry_run=True)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("t2r_record.json", '{"conversion": {"source": "FOLDER"}}', "FOLDER"),
        ("t2r_record.json", '{"data": ["/tmp/me/corpus.jsonl"]}', "/tmp/me/corpus.jsonl"),
        ("report.md", "| data | ~/corpus.jsonl |", "~/corpus.jsonl"),
        ("report.md", "Perplexity on `/usr/share/text.txt`", "/usr/share/text.txt"),
        ("config.json", '"_name_or_path": "FOLDER/base",', "FOLDER/base"),
    ],
)
def test_paths_of_this_machine_are_refused(folder, name, content, found):
    content, found = content.replace("FOLDER", str(folder)), found.replace("FOLDER", str(folder))
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("{", "{" + content, 1) if name == "config.json" else content)
    with pytest.raises(ValueError, match=rf"{name}: names a path of this machine, {found},.*replace it"):
        push(folder, "me/tiny", dry_run=True)


def test_what_only_looks_like_a_path_is_none(folder):
    text = "https://hub/abs/x · 3 tokens/s · key/value · a/b/c.txt · ./x/y · 1/2 · /no/such/root/folder · `/s`"
    (folder / "report.md").write_text(text)
    assert not any(Path(part).exists() for part in ("/no", "/s"))
    push(folder, "me/tiny", dry_run=True)


def test_an_access_token_is_refused(folder):
    (folder / "report.md").write_text(f"export HF_TOKEN={TOKEN}")
    with pytest.raises(ValueError, match=r"report\.md: holds a Hugging Face access token"):
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
