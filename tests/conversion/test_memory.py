"""Peak memory of converting forty shards of 8 MiB, measured in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

SHARDS, SHARD_BYTES = 40, 8 * 2**20

# VmHWM, not ru_maxrss: the latter is inherited across exec, so it would start at pytest's own peak. The second
# argument makes the program hold two shards, to show that the measure would notice.
PROGRAM = """
import sys
import torch
from pathlib import Path
from t2r_conversion import convert
source, hold, out = sys.argv[1:]
convert(source, out, start="window", num_slots=8)
held = [path.read_bytes() for path in sorted(Path(source).glob("*.safetensors"))[: int(hold)]]
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def write_checkpoint(folder, hidden, intermediate, *, buffers=False):
    """A tied Llama with the embedding in its first layer's shard and one layer a shard."""
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": SHARDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 64}
    config = LlamaConfig(**shape, **heads, tie_word_embeddings=True)
    folder.mkdir()
    config.save_pretrained(folder)
    key_value, weight_map = config.head_dim, {}
    for layer in range(SHARDS):
        shapes = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (key_value, hidden),
            "self_attn.v_proj.weight": (key_value, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
        }
        tensors = {f"model.layers.{layer}.{name}": torch.full(size, float(layer)) for name, size in shapes.items()}
        if buffers:
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        if layer == 0:
            tensors["model.embed_tokens.weight"] = torch.zeros(64, hidden)
            tensors["model.norm.weight"] = torch.zeros(hidden)
        shard = f"model-{layer + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def peak_bytes(source, out, hold=0):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, source, str(hold), out], capture_output=True, text=True, check=True
    )
    return int(run.stdout) * 1024


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("baseline") / "source", 32, 32)


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint):
    return peak_bytes(tiny_checkpoint, tiny_checkpoint.parent / "out")


@pytest.mark.parametrize("buffers", [False, True], ids=["copied", "rewritten"])
def test_never_two_shards_at_once(tmp_path, baseline, buffers):
    source = write_checkpoint(tmp_path / "source", 256, 2528, buffers=buffers)
    assert min(shard.stat().st_size for shard in source.glob("*.safetensors")) > SHARD_BYTES
    assert peak_bytes(source, tmp_path / "out") - baseline < 1.5 * SHARD_BYTES


def test_measure_notices_two_shards(tmp_path, baseline):
    source = write_checkpoint(tmp_path / "source", 256, 2528)
    assert peak_bytes(source, tmp_path / "out", hold=2) - baseline > 1.5 * SHARD_BYTES
