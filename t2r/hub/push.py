"""Upload a model folder to the Hugging Face Hub: the model's files and nothing else."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from t2r.hub.card import CARD, build_card, own_card
from t2r.hub.facts import read_config
from t2r.model.export import code_files
from t2r_conversion.headers import read_headers
from t2r_conversion.record import RECORD
from t2r_conversion.source import SMALL_FILES

MODEL_FILES = (
    *SMALL_FILES,
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "report.md",
    "report.png",
    RECORD,
    *code_files(),
)
TRAINING_STATE = (
    "checkpoint-*",
    "global_step*",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
)


@dataclass(frozen=True)
class Push:
    """An upload, done or only planned.

    Attributes:
        files: name and size in bytes of each file, the card included.
        card: the model card.
        url: where the commit is; None after a dry run.
    """

    files: list[tuple[str, int]]
    card: ModelCard
    url: str | None = None


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
) -> Push:
    """Upload a model folder, with a model card made from its own record.

    The card is written to the folder as `README.md` before the upload. A `README.md` that someone wrote by hand is
    uploaded as it is. The Hub token is huggingface_hub's: from `hf auth login` or the environment.

    Args:
        folder: a model folder.
        repo: the repository on the Hub, "owner/name"; created if it is not there.
        private: create it private. An existing public repository is refused.
        dry_run: touch neither folder nor network.
        revision: branch to commit to, created if it is not there; the default branch when None.
        commit_message: title of the commit.

    Raises:
        ValueError: `repo` is no such name, the folder holds no model or training state, `repo` is public against
            `private`, or the Hub cannot be reached or refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{repo!r} is not the name of a repository on the Hub; give OWNER/NAME")
    folder = Path(folder)
    names = files_to_push(folder)
    card = own_card(folder) or build_card(folder, repo)
    sizes = [(name, (folder / name).stat().st_size) for name in names]
    files = sorted([*sizes, (CARD, len(str(card).encode()))])
    if dry_run:
        return Push(files, card)
    try:
        _prepare_repo(repo, private, revision)
        if own_card(folder) is None:
            card.save(folder / CARD)
        url = _upload(folder, repo, [*names, CARD], revision, commit_message)
    except HTTPError as error:
        raise ValueError(f"{repo}: the Hub refuses or cannot be reached: {error}") from error
    return Push(files, card, url)


def files_to_push(folder: Path) -> list[str]:
    """Names of a model folder's files that belong on the Hub, sorted, without the card.

    Raises:
        ValueError: the folder holds no model, or training state.
    """
    state = _matching(folder, TRAINING_STATE)
    if state:
        raise ValueError(
            f"{folder}: holds training state ({', '.join(state)}), which does not belong on the Hub; "
            f"make a model of the run first: t2r merge {folder} -o OUT"
        )
    read_config(folder)
    read_headers(folder)
    return [name for name in _matching(folder, MODEL_FILES) if (folder / name).is_file()]


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Names below a folder that match; none if there is no such folder."""
    return sorted({path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)})


def _prepare_repo(repo: str, private: bool, revision: str | None) -> None:
    api = HfApi(library_name="t2r")
    # None, not False: an organisation's default may be private.
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ValueError(f"{repo}: exists and is public; make it private on the Hub first, or push without --private")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _upload(folder: Path, repo: str, names: list[str], revision: str | None, commit_message: str | None) -> str:
    commit = HfApi(library_name="t2r").upload_folder(
        repo_id=repo,
        folder_path=folder,
        allow_patterns=[glob.escape(name) for name in names],
        revision=revision,
        commit_message=commit_message or "Upload model with t2r",
    )
    return commit.commit_url
