"""Models and tokenizers from wherever they are: a folder, a Hub id, or a GGUF file."""

import logging
import struct
from pathlib import Path

import torch
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import t2r.model  # noqa: F401, for transformers to know the model type
from t2r_conversion.record import RECORD, read_record

UNLOADABLE = (
    SafetensorError,
    StrictDataclassError,
    struct.error,
    RuntimeError,
    ValueError,
    OSError,
    LookupError,
    TypeError,
)
"""What transformers raises for damaged files and fields."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
UNQUANTISED = ["lm_head", "f_proj"]  # losses multiply by the head's weight themselves; softmax attention has no gates


def load_model(
    source: str | Path, *, dtype: str = "auto", device: str = "auto", bits: int | None = None
) -> PreTrainedModel:
    """A causal language model in eval mode: T2R or any that transformers knows.

    Args:
        source: a model folder, a `.gguf` file or a Hub id.
        dtype: "float32", "bfloat16", "float16", "own" (the checkpoint's), or "auto": the checkpoint's own on CUDA,
            float32 on the CPU.
        device: a torch device, or "auto": CUDA if there is one, else the CPU.
        bits: 8 or 4, of the decoder layers' projections, through bitsandbytes, which must be installed; None for
            `dtype`, as all else is.

    Raises:
        ValueError: there is no such model, its weights are incomplete or damaged, or an argument is unknown.
    """
    torch_device = resolve_device(device)
    torch_dtype = _resolve_dtype(dtype, torch_device)
    location, options = locate(source)
    quantised = {"quantization_config": _quantisation(bits, dtype)} if bits is not None else {}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            location, dtype=torch_dtype, device_map=torch_device, output_loading_info=True, **options, **quantised
        )
    except UNLOADABLE as error:
        raise ValueError(f"{source}: the model cannot be loaded: {error}") from error
    if loading["missing_keys"]:  # transformers would fill them with random numbers
        raise ValueError(
            f"{source}: no weights for {', '.join(sorted(loading['missing_keys']))}; the checkpoint is incomplete, "
            "download or convert it again"
        )
    return model.eval()


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that `load_model` takes.

    Raises:
        ValueError: there is no such model, or it has no tokenizer.
    """
    location, options = locate(source)
    folder = Path(location)
    if not options and folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{source}: no tokenizer in this folder; copy the source model's tokenizer files into it")
    try:
        return AutoTokenizer.from_pretrained(location, **options)
    except UNLOADABLE as error:
        raise ValueError(f"{source}: the tokenizer cannot be loaded: {error}") from error


def locate(source: str | Path) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a source: a path or Hub id, and options. Nothing is loaded.

    Raises:
        ValueError: there is no such model.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{source}: no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        _check_folder(path)
        return str(path), {}
    if path.is_file():
        raise ValueError(f"{source}: is a file; give a model folder, a .gguf file or a Hub id")
    _check_hub_id(str(source))
    return str(source), {}


def record_of(source: str | Path) -> dict:
    """The record of a model that `load_model` takes; empty if it has none, or the Hub gives none out.

    Raises:
        ValueError: there is no such model, or the record is not JSON.
    """
    location, options = locate(source)
    if options:  # a GGUF file
        return {}
    if Path(location).is_dir():
        return read_record(location)
    try:
        return read_record(Path(hf_hub_download(location, RECORD)).parent)
    except (EntryNotFoundError, HTTPError, OSError):
        return {}


def resolve_device(name: str) -> torch.device:
    """The torch device that `name` stands for; "auto" is CUDA if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: torch finds {torch.cuda.device_count()} CUDA devices here; use cpu")
    return device


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name == "own":
        return "auto"  # transformers' word for it
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown; use one of {', '.join(['auto', 'own', *DTYPES])}")
    return DTYPES[name]


def _quantisation(bits: int, dtype: str) -> BitsAndBytesConfig:
    if bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, or None, got {bits}")
    # With 8 bits it logs a cast to float16: of every layer, in every pass.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES.get(dtype),  # float32 where `dtype` names none
        llm_int8_skip_modules=UNQUANTISED,
    )


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: is a finetune run, not a model; merge it first: t2r merge {folder} -o OUT")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a model folder")


def _check_hub_id(name: str) -> None:
    """Ask the Hub once, and at once: `from_pretrained` takes most of a minute to find that it is offline."""
    first = Path(name).parts[0] if name else ""
    if name.startswith((".", "/", "~")) or (name != first and Path(first).exists()):
        raise ValueError(f"{name}: no such folder")
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        found = HfApi().file_exists(name, "config.json")
    except HFValidationError as error:
        raise ValueError(f"{name!r}: no such folder, and no Hub id either") from error
    except (HTTPError, OSError) as error:
        raise ValueError(f"{name}: no such folder, and the Hub does not answer ({error})") from error
    if not found:
        raise ValueError(f"{name}: no such folder, and no such model on the Hub; for a private one: hf auth login")
