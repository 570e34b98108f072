"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[
    Path | None, typer.Option(help="YAML file of settings, or a ready one by name; options given here override it.")
]
Bytes = Annotated[
    str | None, typer.Option("--bytes", help="Size instead: share of 4 bytes a parameter (0.07) or 38MB.")
]
Keep = Annotated[float | None, typer.Option(help="Share of the matrices' parameters to keep, e.g. 0.8.")]
MultiplyAdds = Annotated[float | None, typer.Option(help="Share of the matrices' multiply-adds that may be left.")]
Loss = Annotated[
    float | None, typer.Option(help="Predicted loss tolerated, nats a token: the smallest file within it.")
]
Bits = Annotated[
    list[int] | None,
    typer.Option(help="Widths to round to: 16 (not rounded), 8, 4, 3, 2. Repeatable; all of them with --bytes."),
]
KeepDense = Annotated[list[str] | None, typer.Option(help="Matrices to leave alone, e.g. '*.layers.0.*'. Repeatable.")]
Metric = Annotated[str | None, typer.Option(help="auto (loss where it fits), frobenius, input or loss.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random (0).")]
Dtype = Annotated[str | None, typer.Option(help="Of the saved weights: auto, float32, float16, bfloat16.")]
NoChannels = Annotated[bool, typer.Option("--no-channels", help="Do not drop hidden channels of MLPs.")]
NoGauge = Annotated[bool, typer.Option("--no-gauge", help="Store full cores, for comparisons.")]
NoPropagate = Annotated[bool, typer.Option("--no-propagate", help="Calibrate on the original's inputs only.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Limit = Annotated[int | None, typer.Option(help="Rows per task.")]
BenchmarkData = Annotated[Path | None, typer.Option(help="Folder of local benchmark files instead of hub data sets.")]
Window = Annotated[int | None, typer.Option(help="Tokens per window (512).")]
