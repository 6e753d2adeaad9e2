"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a Hub id, or a .gguf file.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes CUDA if there is one.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, own, float32, bfloat16 or float16; own: the checkpoint's; auto: own on CUDA, float32 on the CPU."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
