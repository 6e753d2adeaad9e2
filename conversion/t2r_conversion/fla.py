"""flash-linear-attention's checkpoints of Gated Slot Attention: the names of their tensors."""

from collections import Counter
from collections.abc import Iterable, Mapping

from t2r.model.configuration_t2r import T2RConfig
from t2r_conversion.fla_config import GSA
from t2r_conversion.headers import SourceTensor, parts_of

NAMES = (
    (".embed_tokens.", ".embeddings."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".mlp_norm."),
    (".self_attn.", ".attn."),
)
"""What a part of a tensor's name is called here and there."""

NAMES_2024 = ((".input_layernorm.", ".attn.norm."), (".post_attention_layernorm.", ".mlp.norm."))
"""The norms, where `norm_first` puts them into the blocks that they come before."""


def our_names(names: Iterable[str], config: T2RConfig, where: str) -> dict[str, tuple[str, ...]]:
    """What each tensor of a checkpoint is called in a T2R model.

    The MLP's projections were one in 2024, gate before up: such a tensor has two names, one for each half of its rows.
    A name that is not known stays.

    Args:
        names: of the checkpoint's tensors.
        config: of the model, from `read_fla_config`.
        where: what to name in an error.

    Raises:
        ValueError: two tensors come to have one name.
    """
    there, expected = set(names), GSA.expected_tensors(config)
    ours: dict[str, tuple[str, ...]] = {}
    for name in sorted(there):
        known = _replaced(name, ((theirs, ours) for ours, theirs in (*NAMES_2024, *NAMES)))
        up = name.replace(".gate_proj.", ".up_proj.")
        ours[name] = (name, up) if up not in there else (known if known in expected else name,)
    count = Counter(name for each in ours.values() for name in each)
    twice = [name for name, each in ours.items() if count[each[0]] > 1]
    if twice:
        raise ValueError(f"{where}: several tensors of one parameter ({', '.join(twice)}); which is meant is not known")
    return ours


def their_name(name: str) -> str:
    """What a T2R model's tensor is called in 0.6.0."""
    return _replaced(name, NAMES)


def _replaced(name: str, parts: Iterable[tuple[str, str]]) -> str:
    return next((name.replace(old, new) for old, new in parts if old in name), name)


def renamed(tensors: Mapping[str, SourceTensor], config: T2RConfig, where: str) -> dict[str, SourceTensor]:
    """A checkpoint's headers under the names that `our_names` gives; arguments and errors as there."""
    headers = {}
    for name, ours in our_names(tensors, config, where).items():
        rows = sum(tensors[name].shape[:1]) // len(ours)
        headers |= parts_of(name, tensors[name], dict.fromkeys(ours, rows))
    return headers
