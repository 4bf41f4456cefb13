"""What --help says of a configuration: every key with its default and the docstring under it in the source."""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

from omegaconf import MISSING

from piflow_dist.config import CONFIG_DIR

WIDTH = 112


def list_choices(schema: type) -> str:
    """The files of configs/ that a key=NAME chooses from."""
    keys = [*(field.name for field in dataclasses.fields(schema)), "experiment"]
    files = {key: "|".join(sorted(path.stem for path in (CONFIG_DIR / key).glob("*.yaml"))) for key in keys}
    return "\n".join(f"  {key}={names}" for key, names in files.items() if names)


def explain_keys(schema: type, prefix: str = "") -> str:
    """A paragraph per key of a configuration dataclass, and of those inside it."""
    meanings, lines = attribute_docs(schema), []
    for field in dataclasses.fields(schema):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            lines.append(explain_keys(type(default), f"{prefix}{field.name}."))
            continue
        lines.append(f"  {prefix}{field.name}={as_typed(default)}")
        if field.name in meanings:
            lines.append(textwrap.indent(textwrap.fill(meanings[field.name], WIDTH), " " * 6))
    return "\n".join(lines)


def as_typed(value: Any) -> str:
    """As it is written on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "(needed)" if value == MISSING else str(value)


def attribute_docs(schema: type) -> dict[str, str]:
    """Name -> the string below it in the class's source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    found: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        text: Any = (
            following.value.value
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            else None
        )
        if isinstance(statement, ast.AnnAssign) and isinstance(text, str):
            found[statement.target.id] = " ".join(text.split())
    return found
