"""Upload a model folder to the Hugging Face Hub: the model's files and nothing else."""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from t2r.hub.card import CARD
from t2r.hub.contents import Contents, check_private, model_contents
from t2r_conversion.headers import one_line

REPLACED = ("*.safetensors", "*.safetensors.index.json")  # an earlier push's would be loaded beside or before the new


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
    adapter_only: bool = False,
    base: str | None = None,
) -> Push:
    """Upload a model folder, with the code that loads it and a model card made from its own record; or an adapter.

    All goes in one commit; nothing is written to the folder. A `README.md` that someone wrote by hand is uploaded as it
    is. What reached the Hub before an upload failed is not sent again by the next. The Hub token is huggingface_hub's:
    from `hf auth login` or the environment.

    Args:
        folder: a model folder, or with `adapter_only` that of a finished `t2r train`.
        repo: the repository on the Hub, "owner/name"; created if it is not there.
        private: create it private. An existing public repository is refused.
        dry_run: do not touch the network.
        revision: branch to commit to, created if it is not there; the default branch when None.
        commit_message: title of the commit.
        adapter_only: what the run has learnt, which makes the model again of its base: `T2RForCausalLM.from_adapter`.
        base: of an adapter: name on the Hub of the model that was converted; None for the one that the record names.

    Raises:
        ValueError: `repo` is no such name, the folder holds no model or something private (see `check_private`), `repo`
            is public against `private`, or the Hub cannot be reached or refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise ValueError(f"{repo!r} is not the name of a repository on the Hub; give OWNER/NAME")
    folder = Path(folder)
    if adapter_only:
        from t2r.hub.adapter import adapter_contents  # PEFT takes its time

        contents = adapter_contents(folder, repo, base)
    elif base is not None:
        raise ValueError(f"base {base!r} is of an adapter; push one with --adapter-only")
    else:
        contents = model_contents(folder, repo)
    check_private(folder, contents)
    files = sorted((name, _size(content)) for name, content in contents.items())
    card = ModelCard(contents[CARD].decode())
    if dry_run:
        return Push(files, card)
    try:
        _prepare_repo(repo, private, revision)
        return Push(files, card, _upload(contents, repo, revision, commit_message))
    except (HTTPError, RuntimeError) as error:
        cause = error if isinstance(error, HTTPError) else error.__cause__
        if not isinstance(cause, HTTPError):  # huggingface_hub says RuntimeError of a large file that did not arrive
            raise
        raise ValueError(
            f"{repo}: the Hub refuses or cannot be reached: {one_line(cause)} (pushed again, it sends only what has "
            "not arrived)"
        ) from error


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _prepare_repo(repo: str, private: bool, revision: str | None) -> None:
    api = HfApi(library_name="t2r")
    # None, not False: an organisation's default may be private.
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ValueError(f"{repo}: exists and is public; make it private on the Hub first, or push without --private")
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)


def _upload(contents: Contents, repo: str, revision: str | None, commit_message: str | None) -> str:
    api = HfApi(library_name="t2r")
    there = api.list_repo_files(repo, revision=revision)
    old = {name for name in there for pattern in REPLACED if fnmatch(name, pattern)} - contents.keys()
    commit = api.create_commit(
        repo,
        [
            *(CommitOperationDelete(name) for name in sorted(old)),
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
        ],
        commit_message=commit_message or "Upload model with t2r",
        revision=revision,
    )
    return commit.commit_url
