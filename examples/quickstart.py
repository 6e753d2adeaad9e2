"""The whole way on a laptop: a real Llama becomes a recurrent model, is finetuned, measured and talks.

Runs the commands that a user would, one after another, and leaves everything in runs/quickstart. A second run reuses
what is there. `make quickstart` brings the model file and calls this.
"""

import json
import pydoc_data.topics
import shlex
import subprocess
import sys
import time
from pathlib import Path

MODEL = Path(".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
RUN = Path("runs/quickstart")
PROMPT = "What is a list in Python? Answer in two sentences."


def write_text(folder: Path) -> None:
    """Real English that every CPython ships, the reference behind `help()`: every eighth topic is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    train = [text for i, text in enumerate(topics) if i % 8]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train), encoding="utf-8")
    (folder / "heldout.txt").write_text("\n\n".join(topics[::8]), encoding="utf-8")


def t2r(*arguments: object) -> None:
    """Show and run a `t2r` command."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ t2r {shlex.join(words)}", flush=True)
    done = subprocess.run([Path(sys.executable).with_name("t2r"), *words])
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Convert, finetune, merge, generate."""
    began = time.perf_counter()
    if not MODEL.is_file():
        sys.exit(f"error: {MODEL} is missing; run `make quickstart`, which downloads it")
    write_text(RUN / "text")
    if not (RUN / "converted").exists():
        calibrate = ("--calibrate", RUN / "text" / "train.jsonl", "--calibration-tokens", 16384)
        t2r("convert", MODEL, "-o", RUN / "converted", *calibrate)
    t2r("train", "examples/quickstart.yaml", "--resume")
    if not (RUN / "merged").exists():
        t2r("merge", RUN / "finetuned", "-o", RUN / "merged")
    t2r("generate", RUN / "merged", "--chat", "--prompt", PROMPT, "--max-new-tokens", 60)
    print(f"\nDone in {time.perf_counter() - began:.0f} s. The report: {RUN}/finetuned/report.md")


if __name__ == "__main__":
    main()
