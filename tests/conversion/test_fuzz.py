"""Damaged checkpoints end in an error that says so: never in another exception, a hang, or files elsewhere."""

import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest

from . import gsa, tiny
from .tiny import convert

COUNT = int(os.environ.get("T2R_FUZZ", "500"))  # mutated inputs of each kind
INTERESTING = (0, -1, 1, 2**31, 2**53, 2**63, 1e308, True, None, "", "..", "../x", "/etc/passwd", "F32", [], {}, [[]])


def mutate_json(text: str, generator: random.Random) -> str:
    """Change, drop or add something somewhere in a JSON text; or a byte of it."""
    if generator.random() < 0.3:
        return mutate_bytes(text.encode(), generator).decode(errors="replace")
    content = json.loads(text)
    for _ in range(generator.randint(1, 3)):
        place, key = content, None
        while isinstance(place, dict | list) and place:
            parent, key = place, generator.choice(list(place) if isinstance(place, dict) else range(len(place)))
            place = place[key]
            if generator.random() < 0.4:
                break
        if key is None:
            continue
        what = generator.random()
        if what < 0.2:
            del parent[key]
        elif what < 0.3 and isinstance(parent, dict) and isinstance(key, str):
            parent[key + generator.choice(("x", ".", "/../", "\\n"))] = parent.pop(key)
        else:
            parent[key] = generator.choice(INTERESTING)
    return json.dumps(content)


def mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    """Flip, cut, double or overwrite bytes, most of them near the beginning."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        at = min(int(generator.expovariate(1 / 200)), max(0, len(content) - 1))
        what = generator.random()
        if not content or what < 0.1:
            content[at:at] = generator.randbytes(generator.randint(1, 9))
        elif what < 0.2:
            del content[at:]
        elif what < 0.3:
            del content[at : at + generator.randint(1, 9)]
        else:
            content[at] = generator.randrange(256)
    return bytes(content)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder, spec = tmp_path_factory.mktemp("sound"), {"layers": [1], "num_heads": 4, "num_kv_heads": 2}
    config = gsa.CONFIG | gsa.OF_2024 | {"attn": spec | {"window_size": 9}}
    gsa.write(folder / "gsa", config, gsa.as_in_2024(gsa.weights(config)), shards=2)
    return {"llama": tiny.llama(folder / "llama", shard_size="20KB"), "gsa": folder / "gsa"}


@pytest.mark.parametrize("family", ["llama", "gsa"])
@pytest.mark.parametrize("kind", ["config.json", "model.safetensors.index.json", "shard", "header"])
def test_damage_is_an_error_of_ours(tmp_path, sound, family, kind):
    shutil.copytree(sound[family], tmp_path / "source")
    source, refused, options = tmp_path / "source", 0, {"num_slots": 8}
    if family == "gsa":
        options = {"start": None}
    file = sorted(source.glob("*.safetensors"))[0] if kind in ("shard", "header") else source / kind
    whole = file.read_bytes()
    for seed in range(COUNT):
        generator = random.Random(f"{kind} {seed}")
        if kind == "header":
            length = int.from_bytes(whole[:8], "little")
            header = mutate_json(whole[8 : 8 + length].decode(), generator).encode()
            file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
        elif kind == "shard":
            file.write_bytes(mutate_bytes(whole, generator))
        else:
            file.write_text(mutate_json(whole.decode(), generator))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                convert(source, tmp_path / "out", overwrite=True, **options)
        except Exception as error:
            if not isinstance(error, ValueError) or "\n" in str(error):
                raise AssertionError(f"{kind}, seed {seed}: {type(error).__name__}: {error}") from error
            refused += 1
        assert {path.name for path in tmp_path.iterdir()} <= {"source", "out"}, f"seed {seed}"
    assert refused > COUNT / 4
    assert not Path("/etc/passwd.partial").exists()
