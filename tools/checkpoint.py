"""Checkpoints, for people: python tools/checkpoint.py COMMAND ...

  ls RUN                        which there are: step, date, size, loss, processes, what is damaged (by file sizes)
  verify RUN|CHECKPOINT         read every byte and compare it with the manifest; exit code 1 where something is damaged
  show RUN|CHECKPOINT           what is in it, what it comes from, its configuration
  diff A B [all=true]           settings and parameters that differ, the largest 20 differences first
  reshard SRC RUN dp=D tp=T     write RUN/checkpoints/step_N as D x T processes would have written it
  rm RUN|CHECKPOINT [step=N] yes=true

RUN is a run folder, CHECKPOINT one of its checkpoints/step_N; where one is wanted, RUN stands for its newest good one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from piflow_dist.checkpoint.catalog import (
    Entry,
    checkpoint_folders,
    describe_contents,
    leftovers,
    look_at,
    look_at_all,
    one_checkpoint,
    remove,
)
from piflow_dist.checkpoint.compare import Comparison, compare
from piflow_dist.checkpoint.files import CheckpointError
from piflow_dist.checkpoint.reshard import reshard
from piflow_dist.cli import parse_options, run_tool
from piflow_dist.config import ConfigError, require
from piflow_dist.launch.console import progress_of
from piflow_dist.launch.lock import only_user

console = Console(soft_wrap=True, highlight=False)
SHOWN = 20
UNITS = ("B", "KB", "MB", "GB", "TB")


@dataclass(kw_only=True)
class DiffOptions:
    all: bool = False


@dataclass(kw_only=True)
class ReshardOptions:
    dp: int = 1
    tp: int = 1


@dataclass(kw_only=True)
class RemoveOptions:
    step: int | None = None
    yes: bool = False


@dataclass(kw_only=True)
class NoOptions:
    pass


def checkpoint(arguments: list[str]) -> None:
    command, places, options = split(arguments)
    match command:
        case "ls" | "verify":
            parse_options(NoOptions, options)
            (source,) = expect(places, command, "RUN")
            list_checkpoints(source, contents=command == "verify")
        case "show":
            parse_options(NoOptions, options)
            (source,) = expect(places, command, "RUN|CHECKPOINT")
            show(one_checkpoint(source))
        case "diff":
            shown = parse_options(DiffOptions, options)
            a, b = map(one_checkpoint, expect(places, command, "A", "B"))
            with progress_of("parameters") as progress:
                comparison = compare(a, b, progress)
            show_difference(a, b, comparison, None if shown.all else SHOWN)
        case "reshard":
            world = parse_options(ReshardOptions, options)
            source, run = expect(places, command, "SRC", "RUN")
            with only_user(Path(run) / ".lock", f"run {run}"), progress_of("tensors") as progress:
                made = reshard(one_checkpoint(source), Path(run), world.dp, world.tp, progress)
            console.print(f"{made}: written for dp={world.dp} tp={world.tp}, and equal to {source}.", markup=False)
        case "rm":
            wanted = parse_options(RemoveOptions, options)
            (source,) = expect(places, command, "RUN|CHECKPOINT")
            with only_user(run_of(source) / ".lock", f"run {run_of(source)}"):
                console.print(f"{remove(source, wanted.step, wanted.yes)}: deleted.", markup=False)
        case _:
            raise ConfigError(
                f"{command!r} is no command. Choose one of: ls, verify, show, diff, reshard, rm; see --help."
            )


def run_of(source: str) -> Path:
    """The run folder that a run or checkpoint folder belongs to. A training that lives has its lock."""
    (folder, *_) = (path.parent for path in checkpoint_folders(source))
    return folder.parent if folder.name == "checkpoints" else folder


def split(arguments: list[str]) -> tuple[str, list[str], list[str]]:
    """Command, places, and options (key=value; a place that holds a = is written ./so=)."""
    require(bool(arguments), "Give a command: ls, verify, show, diff, reshard or rm; see --help.")
    options = [argument for argument in arguments[1:] if "=" in argument.partition("/")[0]]
    return arguments[0], [argument for argument in arguments[1:] if argument not in options], options


def expect(places: list[str], command: str, *wanted: str) -> list[str]:
    require(
        len(places) == len(wanted),
        f"{command} takes {' '.join(wanted)}; given: {' '.join(places) or 'nothing'}. See --help.",
    )
    return places


def list_checkpoints(source: str, contents: bool) -> None:
    entries = look_at_all(source, contents)
    table = Table(box=box.SIMPLE, title=escape(source), title_justify="left")
    for column, side in (("step", "right"), ("written", "left"), ("size", "right"), ("loss", "right")):
        table.add_column(column, justify=side, no_wrap=True)
    table.add_column("processes", no_wrap=True)
    table.add_column("verified" if contents else "files", overflow="fold")
    for entry in entries:
        loss = entry.state.get("metrics", {}).get("loss")
        table.add_row(
            str(entry.step),
            date(entry),
            size(entry.bytes),
            "" if loss is None else f"{loss:.4f}",
            entry.world,
            "[green]whole[/]" if entry.problem is None else f"[red]damaged:[/] {escape(entry.problem)}",
        )
    console.print(table)
    for path in leftovers(source):
        console.print(f"left by a killed save: {path.name} (the run's next save removes it)", markup=False)
    damaged = [entry for entry in entries if entry.problem is not None]
    if contents and damaged:
        raise CheckpointError(f"{len(damaged)} of {len(entries)} checkpoints are damaged.")


def show(path: Path) -> None:
    entry = look_at(path, contents=False)
    state = entry.state
    if not state:
        raise CheckpointError(f"{path} cannot be shown: {entry.problem}")
    table = Table(box=box.SIMPLE, title=escape(str(path)), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    config, contents = state["config"], describe_contents(path, state) if entry.problem is None else None
    rows = {
        "step": f"{entry.step} of {config['train']['steps']}",
        "written": date(entry),
        "files": "whole (by their sizes; verify reads them)" if entry.problem is None else entry.problem,
        "processes": f"{state['dp_size'] * state['tp']} ({entry.world})",
        "objective": f"{config['objective']}, mode={config['mode']}, policy={config['policy']['type']}",
        "size": size(entry.bytes),
    }
    if contents is not None:
        parts = ", ".join(f"{kind} {size(count)}" for kind, count in contents.bytes.items())
        rows["trained"] = f"{contents.parameters:,} parameters in {contents.tensors} tensors: {parts}"
    metrics = ", ".join(f"{key} {value:.6g}" for key, value in state.get("metrics", {}).items())
    teacher = f"{config['distill']['teacher']} (fingerprint {str(state.get('teacher'))[:12]})"
    rows |= {
        "metrics": metrics,
        "updates skipped": str(state["train"].get("skipped_total", "")),
        "data": f"{config['data']['root']} (fingerprint {state['data']['dataset'][:12]})",
        "teacher": teacher if state.get("teacher") else "",
        "started from": lineage(state.get("started_from")),
        "parent": lineage(state.get("parent")),
        "torch": state.get("torch", ""),
    }
    for key, value in rows.items():
        if value:
            table.add_row(key, escape(value))
    console.print(table)
    console.print(OmegaConf.to_yaml(OmegaConf.create(config)).rstrip(), markup=False)


def show_difference(a: Path, b: Path, found: Comparison, limit: int | None) -> None:
    changed = {**found.state, **found.settings}
    if changed:
        table = Table(box=box.SIMPLE, title="settings", title_justify="left")
        for column in ("", f"A {a}", f"B {b}"):
            table.add_column(escape(column), overflow="fold")
        for key, (old, new) in changed.items():
            table.add_row(key, escape(short(old)), escape(short(new)))
        console.print(table)
    for title, names in (("only in A", found.missing), ("only in B", found.extra)):
        if names:
            console.print(f"{title}: {', '.join(names)}", markup=False)
    differing = [p for p in found.parameters if p.weights != 0 or p.ema != 0]
    if differing:
        table = Table(box=box.SIMPLE, title="parameters: |B - A| / |A|", title_justify="left")
        table.add_column("", overflow="fold")
        for column in ("weights", "ema"):
            table.add_column(column, justify="right", no_wrap=True)
        for parameter in differing[:limit]:
            if parameter.weights is None:
                table.add_row(parameter.name, f"{parameter.shapes[0]} and", f"{parameter.shapes[1]}")
            else:
                table.add_row(parameter.name, f"{parameter.weights:.3e}", f"{parameter.ema:.3e}")
        console.print(table)
    if limit is not None and len(differing) > limit:
        console.print(f"{len(differing) - limit} smaller differences; all=true shows them.")
    equal = len(found.parameters) - len(differing)
    console.print(
        f"{len(differing)} of {len(found.parameters)} common parameters differ, {equal} are equal to the bit."
    )


def lineage(origin: object) -> str:
    return (
        ", ".join(f"{key} {short(value)}" for key, value in origin.items())
        if isinstance(origin, dict)
        else short(origin)
    )


def short(value: object) -> str:
    text = "" if value is None else str(value)
    return text[:12] if len(text) == 64 and " " not in text and "/" not in text else text


def date(entry: Entry) -> str:
    return "" if entry.written is None else f"{entry.written:%Y-%m-%d %H:%M}"


def size(count: float) -> str:
    unit = 0
    while count >= 1000 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.1f} {UNITS[unit]}" if unit else f"{count} B"


if __name__ == "__main__":
    run_tool(checkpoint, sys.argv[1:], __doc__)
