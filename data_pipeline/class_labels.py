"""Class names as prompts, for models of classes (ImageNet).  D width = number of classes + 1"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError


class ClassLabelEncoder:
    """One row (1, D): one-hot at the class's label, its place in `classes`. "" is the null class, the last number.

    names: one a class, for people: "tench" is then as good a prompt as "n01440764". A name of several classes (ImageNet
    has two cranes) is refused as a prompt; so is what is no class.
    """

    pooled_dim = None

    def __init__(self, classes: Sequence[str], names: Sequence[str] = ()):
        self.classes, self.names = list(classes), list(names)
        self.dim = len(self.classes) + 1
        if not self.classes or "" in self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"ClassLabelEncoder needs classes, each with a name of its own; got {self.classes[:20]}.")
        if self.names and len(self.names) != len(self.classes):
            raise ValueError(f"ClassLabelEncoder: {len(self.names)} names for {len(self.classes)} classes.")
        self._label_of: dict[str, int | None] = {}
        for label, name in enumerate(self.names):
            self._label_of[name] = None if name in self._label_of else label
        self._label_of |= {name: label for label, name in enumerate(self.classes)} | {"": len(self.classes)}

    def encode(self, prompts: list[str]) -> list[Tensor]:
        labels = torch.tensor([self.label(prompt) for prompt in prompts])
        return list(torch.nn.functional.one_hot(labels, self.dim).float().unsqueeze(1)) if prompts else []

    def cut(self, prompt: str) -> str:
        return ""

    def label(self, prompt: str) -> int:
        """Raises ValueError for what names no class, or several."""
        label = self._label_of.get(prompt, -1)
        if label is None:
            several = [name for name, other in zip(self.classes, self.names, strict=True) if other == prompt]
            raise ValueError(f"Prompt {prompt!r} is the name of several classes. Write one of: {', '.join(several)}.")
        if label < 0:
            some = ", ".join(self.classes[:5]) + (", ..." if len(self.classes) > 5 else "")
            raise ValueError(
                f'Prompt {prompt!r} is none of the {len(self.classes)} classes ({some}), nor "", the null class.'
            )
        return label

    def describe(self) -> dict[str, Any]:
        return {"kind": "class_labels", "classes": self.classes, "names": self.names}


def read_labels(path: Path) -> ClassLabelEncoder:
    """A text file, one class a line in the order of the labels: a folder's name and, if people call it otherwise, that
    name behind a blank ("n01440764 tench, Tinca tinca"), or behind a tab where names of folders have blanks.

    Raises FileNotFoundError, or DataError where a line names a class twice or only some lines have names.
    """
    if not path.is_file():
        raise FileNotFoundError(f"labels={path} does not exist. Give a text file with one class a line.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"labels={path} is not UTF-8 ({error.reason}).") from error
    sign = "\t" if "\t" in text else None
    lines = [line.strip().split(sign, maxsplit=1) for line in text.splitlines() if line.strip()]
    with_name = [len(line) == 2 for line in lines]
    if any(with_name) and not all(with_name):
        raise DataError(f"labels={path}, line {1 + with_name.index(False)}: has no name where other lines have one.")
    try:
        classes, names = [line[0].strip() for line in lines], [" ".join(line[1].split()) for line in lines if line[1:]]
        return ClassLabelEncoder(classes, names)
    except ValueError as error:
        raise DataError(f"labels={path}: {error}") from error


def in_label_order(classes: set[str]) -> list[str]:
    """Sorted as folders are in ImageNet's usual labels; numbers by their value."""
    return sorted(classes, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name))
