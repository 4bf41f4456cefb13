"""Progress of the only slow part: training the feature network."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from piflow_dist.launch.console import StepProgress


@contextmanager
def training_progress() -> Iterator[Callable[[int, int], None]]:
    """A progress(step, steps) for `load_or_train`. The bar appears with the first step: never with a cached network."""
    with ExitStack() as stack:
        bars: list[StepProgress] = []

        def progress(step: int, steps: int) -> None:
            if not bars:
                bars.append(stack.enter_context(StepProgress("feature network", steps, start=step - 1, every=90)))
            bars[0].update(step)

        yield progress
