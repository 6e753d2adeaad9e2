"""GGUF files, written here with llama.cpp's own package."""

from collections import namedtuple

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from t2r_conversion import read_source, source, write, writer
from tests.conversion.tiny import convert, plan_conversion

from . import tiny

SPECIAL = ["<unk>", "<s>", "</s>"]
NAMES_OF = {"phi3": gguf.MODEL_ARCH.PHI3}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def model(tied, family="llama"):
    torch.manual_seed(0)
    shape = tiny.SHAPE | {"vocab_size": len(SPECIAL) + 258, "tie_word_embeddings": tied, "rms_norm_eps": 1e-5}
    config_class, model_class = tiny.MODELS[family]
    return model_class(config_class(**shape))


def write_gguf(path, llama, architecture="llama", **more):
    """A GGUF file of a Llama, with a byte-level tokenizer."""
    config, file = llama.config, gguf.GGUFWriter(path, architecture)
    file.add_name("tiny")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(SPECIAL + list(bytes_to_unicode().values()) + ["ab", "cd"])
    file.add_token_types([3] * len(SPECIAL) + [1] * 258)
    file.add_token_merges(["a b", "c d"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(0)
    file.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(NAMES_OF.get(architecture, gguf.MODEL_ARCH.LLAMA), config.num_hidden_layers)
    for name, tensor in llama.state_dict().items():
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            file.add_tensor(names.get_name(name, (".weight",)), as_llama_cpp(name, tensor.numpy(), config))
    for name, tensor in more.items():
        file.add_tensor(name.replace("__", "."), tensor)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def as_llama_cpp(name, weight, config):
    """llama.cpp pairs neighbouring rotary dimensions, Hugging Face pairs halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    paired = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(weight.shape))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_config_and_tokenizer_come_through(tmp_path, tied):
    llama = model(tied)
    file = write_gguf(tmp_path / "tiny.gguf", llama)
    plan = convert(file, tmp_path / "out", num_slots=8)
    written, original = tiny.load_all(tmp_path / "out"), llama.state_dict()
    if tied:
        del original["lm_head.weight"]
    assert set(written) == set(original) | {tensor.name for tensor in plan.having("new")}
    for name, tensor in original.items():
        assert torch.equal(written[name], tensor), name
    assert plan.config.tie_word_embeddings == tied
    assert plan.config.num_key_value_heads == 2
    assert plan.source.name == "tiny.gguf"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("cabs to be").input_ids, skip_special_tokens=True) == "cabs to be"
    assert tokenizer.chat_template == TEMPLATE
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_a_family_that_fuses_projections(tmp_path):
    source = model(False, "phi3")
    convert(write_gguf(tmp_path / "tiny.gguf", source, "phi3"), tmp_path / "out", num_slots=8)
    written, original = tiny.load_all(tmp_path / "out"), source.state_dict()
    qkv = [written[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(qkv), original["model.layers.1.self_attn.qkv_proj.weight"])


def test_dry_run_unpacks_nothing(tmp_path, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", model(True))
    headers = convert(file, tmp_path / "out", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]
    real = convert(file, tmp_path / "out")
    assert {(t.name, t.shape, t.action, t.bytes) for t in headers.tensors} == {
        (t.name, t.shape, t.action, t.bytes) for t in real.tensors
    }
    assert capsys.readouterr().out == ""


def test_tensor_that_would_be_lost_is_refused(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", model(True), rope_freqs__weight=np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"1 unexpected: rope_freqs\.weight"):
        convert(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_output_and_disk_are_checked_before_unpacking(tmp_path, monkeypatch):
    def unpack(*_):
        raise AssertionError("unpacked for nothing")

    file = write_gguf(tmp_path / "tiny.gguf", model(True))
    (tmp_path / "taken").mkdir()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(source, "unpack_gguf", unpack)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage(0, 0, 1000))
    with pytest.raises(ValueError, match="exists already"):
        convert(file, tmp_path / "taken")
    with pytest.raises(ValueError, match="bytes needed"):
        convert(file, tmp_path / "out")
    with pytest.raises(ValueError, match="only its headers were read"):
        write(plan_conversion(read_source(file)), tmp_path / "out")


def test_unsupported_architecture(tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", model(True), architecture="bloom")
    with pytest.raises(ValueError, match="'bloom' is not supported; supported families: llama, mistral"):
        read_source(file)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_file(tmp_path, keep):
    file = write_gguf(tmp_path / "tiny.gguf", model(True))
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"tiny\.gguf: not a whole GGUF file"):
        convert(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    file = write_gguf(tmp_path / "tiny.gguf", model(True))
    (tmp_path / ".out.unpacked").mkdir()
    (tmp_path / ".out.unpacked" / "half").write_text("of a killed run")
    with monkeypatch.context() as patch:
        patch.setattr("t2r_conversion.gguf._save_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]
    convert(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]
