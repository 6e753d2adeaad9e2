"""What breaks a run from outside, in words that say what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)
# How gloo, which raises plain RuntimeErrors, speaks of a process that is gone.
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "gloo/transport")


@contextmanager
def explained(folder: Path, processes: int) -> Iterator[None]:
    """Say of errors within the context what they come from, if they come from outside.

    Args:
        folder: where checkpoints are written.
        processes: of the run.

    Raises:
        ValueError: the disk is full, or another process of the run has ended.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if _is_full(error, folder):
            raise ValueError(
                f"{folder}: the disk is full; make room, and --resume goes on from the last whole checkpoint"
            ) from error
        if processes > 1 and isinstance(error, RuntimeError) and _is_peers(error):
            raise ValueError(
                "another process of this run seems to have ended: what it printed says why, unless it was killed (out "
                "of memory?); --resume goes on from the last checkpoint. What was seen here: "
                f"{str(error).strip().splitlines()[0]}"
            ) from error
        raise


def _is_peers(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(part in str(error) for part in PEER_GONE)


def _is_full(error: BaseException | None, folder: Path) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if "No space left on device" in str(error):
            return True
        if "inline_container" in str(error) and shutil.disk_usage(folder).free < 2**26:  # torch.save says no more
            return True
        error = error.__cause__ or error.__context__
    return False
