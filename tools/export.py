"""Export a student: python tools/export.py source=RUN out=DIR [format=adapter|merged] [ema=false] [dtype=bf16]

adapter: a tied student's adapters and head, as LakonLab's pi-Flow pipelines and ComfyUI-piFlow read them. merged: the whole
transformer in diffusers' layout, also of a full student or a teacher. docs/export.md describes both.
"""

import sys

from data_pipeline.settings import list_settings
from piflow_dist.checkpoint.export import ExportConfig, export
from piflow_dist.cli import parse_options, run_tool
from piflow_dist.launch.console import progress_of


def run_export(arguments: list[str]) -> None:
    options = parse_options(ExportConfig, arguments)
    with progress_of("tensors") as progress:
        done = export(options, progress)
    if not done.base_known:
        print("The base could not be opened (base=PATH): the folder does not say which one the adapter belongs to.")
    weights = "averaged" if options.ema else "raw"
    print(
        f"{done.out}: {done.tensors} tensors, {done.bytes / 1e6:,.1f} MB, {weights} weights of {done.checkpoint} (step {done.step})."
    )


if __name__ == "__main__":
    defaults = (
        f"Options and their defaults (piflow_dist/checkpoint/export.py explains them):\n{list_settings(ExportConfig)}"
    )
    run_tool(run_export, sys.argv[1:], f"{__doc__}\n{defaults}")
