"""`t2r generate`."""

import sys
from typing import Annotated

import typer

from t2r.cli.console import note, size
from t2r.cli.options import Device, Dtype, Model


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue, or the message to answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(max=1, help="Sample from the most likely tokens up to this probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of sampling, to get the same text again.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; by default if there is one.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Generate text from a prompt, as it comes."""
    from t2r.evaluation import generate_stream, load_model, load_tokenizer

    if temperature == 0 and (top_p != 1 or seed is not None):
        note("note: --top-p and --seed have no effect at temperature 0; give --temperature")
    stats = generate_stream(
        load_model(model, dtype=dtype, device=device),
        load_tokenizer(model),
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        on_text=_write,
    )
    _write("\n")
    note(
        f"{stats.prompt_tokens} tokens of prompt, {stats.new_tokens} new, {stats.tokens_per_second:.1f} tokens/s, "
        f"state of {size(stats.state_bytes)}"
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
