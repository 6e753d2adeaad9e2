"""`t2r convert`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from t2r.cli.console import note, out, print_json, progress_bar
from t2r.cli.options import Json, Output, Overwrite


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder, a Hub id, or a .gguf file.")],
    output: Output,
    source_format: Annotated[
        str | None, typer.Option("--from", metavar="fla", help="Refuse what is not flash-linear-attention's GSA.")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="How the recurrent layers begin: routed (the default), window or paper.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Slots of each key/value head, in the mean; 64 if not given.")
    ] = None,
    slots_by_layer: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="Slots of each head: 'by need' (routed start: if not given), 'even', or each layer's, as 48,80,64, or "
            "each head's of a layer, as 48,64/128/48,64.",
        ),
    ] = "",
    sinks: Annotated[int, typer.Option(help="Window and routed start: slots that keep the first tokens.")] = 4,
    keep_softmax: Annotated[str, typer.Option(metavar="0,8,16", help="Layers that keep softmax attention.")] = "",
    window: Annotated[
        int | None,
        typer.Option(metavar="N", help="Window and routed start: a softmax window of N tokens beside the slots."),
    ] = None,
    gate_write: Annotated[
        float | None, typer.Option(help="Window and routed start: logit that empties the slot being written.")
    ] = None,
    gate_keep: Annotated[
        float | None, typer.Option(help="Window and routed start: logit that keeps the other slots.")
    ] = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Routed start: a .txt or .jsonl file that routers are fitted to.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Routed start: of that text, at most.")] = 32768,
    dtype: Annotated[
        str | None, typer.Option(help="Of all weights: float32, float16 or bfloat16; the source's if not given.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="5GB", help="Cut the weights into shards of at most so much.")
    ] = "",
    hard_link: Annotated[
        bool, typer.Option("--hard-link", help="Share unchanged shards with the source; write to neither afterwards.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load source and result afterwards, and compare their logits.")
    ] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Convert a softmax Transformer (Llama, Mistral, Phi-3, Qwen2, Qwen3) into a recurrent T2R model.

    Gated Slot Attention models of flash-linear-attention become T2R models as they are.
    """
    import t2r_conversion
    from t2r_conversion.record import read_record

    if verify:
        _check_verifiable(source)
    gates = {"gate_write": gate_write, "gate_keep": gate_keep}
    with progress_bar("converting") as progress:
        plan = t2r_conversion.convert(
            source,
            output,
            start=start,
            num_slots=slots,
            slots_by_layer=_slots(slots_by_layer),
            num_sinks=sinks,
            keep_softmax=_numbers(keep_softmax, "--keep-softmax"),
            window=window,
            dtype=dtype,
            max_shard_size=_size(max_shard_size),
            calibrate=calibrate,
            calibration_tokens=calibration_tokens,
            **{name: value for name, value in gates.items() if value is not None},
            hard_link=hard_link,
            source_format=source_format,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
            calibrating=progress,
        )
    if json:
        print_json(plan.as_dict())
    else:
        out.print(t2r_conversion.render(plan))
    if dry_run:
        note("dry run: nothing is written")
        return
    shards = read_record(output)["conversion"]["shards"]
    note(f"written to {output}; shards: {', '.join(f'{count} {how}' for how, count in shards.items())}")
    if verify:
        _verify(source, output)


def _check_verifiable(source: str) -> None:
    from t2r_conversion import read_source

    if read_source(source).family.recurrent:
        raise ValueError(
            f"--verify compares softmax attention, which {source} has none of; python -m benchmarks.checkpoints "
            "compares with flash-linear-attention, on a GPU"
        )


def _verify(source: str, output: Path) -> None:
    from t2r.evaluation import verify_conversion
    from t2r_conversion.calibrate import reference

    found = verify_conversion(source, output, reference())
    note(
        f"verified on {found.tokens} tokens: with softmax attention the logits are the source's to {found.softmax:.1e} "
        f"of their spread, with slots on the first of them to {found.slots:.1e}; "
        f"{found.agreement:.1%} of all next tokens are the same"
    )


def _slots(text: str) -> str | list[int | list[int]] | None:
    """A number for each layer, "48,80", or for each head of one, "48,64/128"."""
    if not text[:1].isdigit():
        return text or None
    try:
        layers = [[int(slots) for slots in layer.split("/")] for layer in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--slots-by-layer {text!r}: give layers' numbers with commas between them, heads' with slashes, as "
            "48,64/128/64,80"
        ) from error
    return [slots if len(slots) > 1 else slots[0] for slots in layers]


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: give numbers with commas between them, as 0,8,16") from error


def _size(text: str) -> int | None:
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]i?)?B?", text, flags=re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"--max-shard-size {text!r}: give a size like 500MB or 5GB")
    unit = (found[2] or "").upper()
    return int(float(found[1]) * (1024 if unit.endswith("I") else 1000) ** " KMG".index(unit[:1] or " "))
