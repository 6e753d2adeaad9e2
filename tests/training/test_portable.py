"""What a run hands on without its base, and the model that it makes of it again."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from t2r.hub import push
from t2r.model import T2RForCausalLM
from t2r.training import merge, run
from tests.hub.loopback import TOKEN, loopback
from tests.model.tiny import teacher, tokens
from tests.training.tiny import save_tokenizer, workspace


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A softmax model in bf16, its routed student, and a finished run on that."""
    folder = tmp_path_factory.mktemp("work")
    config = workspace(folder, start="routed", layer_types=["linear_attention"] * 2 + ["full_attention"])
    AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(folder / "model")
    teacher().to(torch.bfloat16).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    shutil.copyfile(folder / "model" / "generation_config.json", folder / "base" / "generation_config.json")
    run(config, ["lora.options={use_rslora: true}", "optim.router_lr=0.01"])
    merge(folder / "run", folder / "merged")
    return folder


@pytest.fixture(scope="module")
def adapter(work):
    """What a push of the run alone leaves on a Hub, in a folder."""
    (work / "adapter").mkdir()
    with loopback() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        push(work / "run", "me/tiny-adapter", adapter_only=True, base="someone/llama-tiny")
        for name, content in hub.files("me/tiny-adapter").items():
            (work / "adapter" / name).write_bytes(content)
    return work / "adapter"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_merged_with_its_base_it_is_the_run_merged(work, adapter, tmp_path):
    merge(adapter, tmp_path / "again", base=work / "base")
    assert files(tmp_path / "again") == files(work / "merged")


def test_a_base_whose_dtype_was_changed_when_it_was_converted(work, adapter):
    teacher().save_pretrained(work / "base32")
    model = T2RForCausalLM.from_adapter(work / "base32", adapter)
    assert model.dtype == torch.bfloat16
    for name, tensor in load_file(work / "merged" / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_base_that_holds_projections_as_one(work, adapter, tmp_path):
    llama = teacher().to(torch.bfloat16)
    fields = Phi3Config().to_dict().keys() & llama.config.to_dict().keys() - {"model_type", "architectures"}
    phi = Phi3ForCausalLM(Phi3Config(**{name: getattr(llama.config, name) for name in fields})).to(torch.bfloat16)
    own = llama.state_dict()
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, tensor in phi.state_dict().items():
        *path, module, weight = name.rsplit(".", 2)
        tensor.copy_(torch.cat([own[".".join([*path, part, weight])] for part in parts.get(module, (module,))]))
    phi.save_pretrained(tmp_path)
    model = T2RForCausalLM.from_adapter(tmp_path, adapter)
    for name, tensor in load_file(work / "merged" / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_model_is_there_without_a_folder(work, adapter):
    model = T2RForCausalLM.from_adapter(work / "base", adapter)
    expected = AutoModelForCausalLM.from_pretrained(work / "merged", dtype="auto")
    assert type(model) is T2RForCausalLM
    assert model.dtype == torch.bfloat16
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 40)).logits, expected(tokens(2, 40)).logits)


def test_what_is_pushed_is_small_and_names_its_base(work, adapter):
    names = {path.name for path in adapter.iterdir()} - {".gitattributes"}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "t2r_config.json",
        "t2r_tensors.safetensors",
        "t2r_record.json",
        "report.md",
        "report.png",
    }
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/llama-tiny"
    assert {name.split(".")[-2] for name in load_file(adapter / "t2r_tensors.safetensors")} == {"router"}
    card = (adapter / "README.md").read_text()
    for line in ("base_model: someone/llama-tiny", "base_model_relation: adapter", '"me/tiny-adapter")', "## Training"):
        assert line in card
    assert str(work) not in "".join(text.decode(errors="replace") for text in files(adapter).values())


def test_another_base_of_the_same_shape_is_refused(work, adapter, tmp_path):
    teacher(seed=1).to(torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: not the model that .*adapter was trained on"):
        T2RForCausalLM.from_adapter(tmp_path / "other", adapter)
    teacher().to(torch.float16).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"half: not the model that"):
        merge(adapter, tmp_path / "out", base=tmp_path / "half")
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter(work, adapter, tmp_path):
    with pytest.raises(ValueError, match=r"base: no adapter_config\.json, .*give a run of t2r train"):
        merge(work / "base", tmp_path / "out")
    shutil.copytree(adapter, tmp_path / "part")
    (tmp_path / "part" / "t2r_tensors.safetensors").unlink()
    with pytest.raises(ValueError, match=r"part: no t2r_tensors\.safetensors"):
        T2RForCausalLM.from_adapter(work / "base", tmp_path / "part")
    with pytest.raises(ValueError, match="a run names its model itself"):
        merge(work / "run", tmp_path / "out", base=work / "base")


def test_runs_that_have_no_adapter_to_push(work, tmp_path):
    with pytest.raises(ValueError, match=r"no name on the Hub is known of its base \(tiny\); give --base OWNER/NAME"):
        push(work / "run", "me/x", adapter_only=True, dry_run=True)
    with pytest.raises(ValueError, match="so this is not the folder of a t2r train run"):
        push(work / "model", "me/x", adapter_only=True, base="a/b", dry_run=True)
    shutil.copytree(work / "run", tmp_path / "full", ignore=shutil.ignore_patterns("adapter*", "*-distill"))
    (tmp_path / "full" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="trained in full, so there are no adapters"):
        push(tmp_path / "full", "me/x", adapter_only=True, base="a/b", dry_run=True)
    with pytest.raises(ValueError, match="is of an adapter; push one with --adapter-only"):
        push(work / "merged", "me/x", base="a/b", dry_run=True)


def test_a_run_on_a_finetuned_model_is_more_than_its_adapters(work, tmp_path):
    shutil.copytree(work / "run", tmp_path / "run", ignore=shutil.ignore_patterns("*-distill"))
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace(str(work / "model"), str(work / "merged")))
    with pytest.raises(ValueError, match="was finetuned before"):
        push(tmp_path / "run", "me/x", adapter_only=True, base="a/b", dry_run=True)


def test_adapters_of_a_window_start_need_no_tensors_beside(tmp_path):
    config = workspace(tmp_path)
    teacher().save_pretrained(tmp_path / "base")
    run(config, ["steps=1", "save_every=1"])
    planned = push(tmp_path / "run", "me/x", adapter_only=True, base="a/b", dry_run=True)
    assert dict(planned.files)["t2r_tensors.safetensors"] < 200
