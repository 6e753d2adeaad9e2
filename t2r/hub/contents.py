"""What of a folder goes to the Hub, and what keeps it from going there."""

import json
import re
from pathlib import Path

from t2r.hub.card import CARD, build_card, own_card
from t2r.hub.facts import read_config
from t2r.model import T2RConfig
from t2r.model.export import AUTO_MAP, code_files
from t2r_conversion.headers import read_headers
from t2r_conversion.record import RECORD
from t2r_conversion.source import SMALL_FILES

Contents = dict[str, Path | bytes]
"""By name on the Hub, a file or its content."""

REPORTS = ("report.md", "report.png", RECORD)
MODEL_FILES = (*SMALL_FILES, "config.json", "*.safetensors", "*.safetensors.index.json", *REPORTS)
TRAINING_STATE = (
    "checkpoint-*",
    "*/checkpoint-*",
    "global_step*",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
)
TOKENS = ("tokens-*", "token", "stored_tokens")  # t2r's cache of tokenised text, and huggingface_hub's access tokens
NAMING_PATHS = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json", *REPORTS)
PATH = re.compile(r"(?<![\w./:~-])/[\w.-]+(?:/[\w.+-]+)+|~/[\w.-]+")
ACCESS_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def model_contents(folder: Path, repo: str) -> Contents:
    """What of a model folder goes to the Hub: its model's files, the code that loads it, and its card.

    Raises:
        ValueError: the folder holds no model, or training state or tokens.
    """
    _check_folder(folder)
    config = read_config(folder)
    read_headers(folder)
    contents: Contents = {name: folder / name for name in matching(folder, MODEL_FILES)}
    if isinstance(config, T2RConfig):
        contents |= {name: text.encode() for name, text in code_files().items()}
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if raw.get("auto_map") != AUTO_MAP:  # saved before models brought their code
            contents["config.json"] = json.dumps(raw | {"auto_map": AUTO_MAP}, indent=2).encode()
    card = own_card(folder) or build_card(folder, repo)
    return contents | {CARD: str(card).encode()}


def _check_folder(folder: Path) -> None:
    """Raise ValueError if a model folder holds training state or tokens."""
    state = matching(folder, TRAINING_STATE, files_only=False)
    if state:
        raise ValueError(
            f"{folder}: holds training state ({', '.join(state)}), which does not belong on the Hub; "
            f"make a model of the run first: t2r merge {folder} -o OUT"
        )
    tokens = matching(folder, TOKENS, files_only=False)
    if tokens:
        raise ValueError(f"{folder}: holds tokens ({', '.join(tokens)}), which are not for the Hub; move them away")


def check_private(folder: Path, contents: Contents) -> None:
    """Refuse to upload what is nobody else's business.

    Raises:
        ValueError: a file names an access token or a path of this machine.
    """
    for name in sorted(contents.keys() & set(NAMING_PATHS)):
        content = contents[name]
        if name.endswith(".png"):
            continue
        text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        if ACCESS_TOKEN.search(text):
            raise ValueError(f"{folder / name}: holds a Hugging Face access token; take it out, and revoke it")
        if path := _path_of_this_machine(text):
            raise ValueError(
                f"{folder / name}: names a path of this machine, {path}, which everyone could read on the Hub; "
                "replace it there by a name"
            )


def matching(folder: Path, patterns: tuple[str, ...], *, files_only: bool = True) -> list[str]:
    """Names below a folder that match; none if there is no such folder."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() or not files_only}
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _path_of_this_machine(text: str) -> str | None:
    """The first absolute path that begins with a folder of this machine."""
    for path in PATH.findall(text):
        if path.startswith("~") or Path(*Path(path).parts[:2]).exists():
            return path
    home = str(Path.home())  # on Windows the pattern finds none
    return home if len(Path(home).parts) > 2 and (home in text or json.dumps(home)[1:-1] in text) else None
