"""Repair of one broken pair of packages; does nothing where they fit together.

mosaicml-streaming and diffusers import torchvision. The only torchvision for torch 2.13 on the package index is built
for CUDA; beside a CPU torch its compiled operators are missing and `import torchvision` fails while it registers shape
functions for them ("operator torchvision::nms does not exist"). Nothing here calls those operators, so the
registrations are skipped.
"""

import importlib.util
import sys
from typing import Any

import torch


def repair_torchvision() -> None:
    """Import torchvision so that later imports of it succeed. Call before importing streaming or diffusers."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return
    register_fake = torch.library.register_fake

    def register_unless_missing(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    try:
        import torchvision  # noqa: F401  (a whole torchvision needs no repair)
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        torch.library.register_fake = register_unless_missing
        try:
            import torchvision  # noqa: F401
        finally:
            torch.library.register_fake = register_fake
