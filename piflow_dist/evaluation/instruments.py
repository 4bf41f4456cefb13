"""What images are measured with, as far as it is there: networks from local weights and statistics of real images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.store import is_remote
from piflow_dist.evaluation.evaluate import small_network_of
from piflow_dist.evaluation.metrics import NotMeasurable
from piflow_dist.evaluation.networks import Clip, FeatureNetwork, Inception, Lpips, Reward, SmallNetwork
from piflow_dist.evaluation.real import RealStatistics, real_statistics
from piflow_dist.evaluation.settings import EvaluateConfig
from piflow_dist.evaluation.shares import Share


@dataclass
class Tools:
    """What images are looked at with. `notes`: why something is not there, by what it would have measured."""

    network: FeatureNetwork | None = None
    clip: Clip | None = None
    lpips: Lpips | None = None
    rewards: list[Reward] = field(default_factory=list)
    real: RealStatistics | None = None
    notes: dict[str, str] = field(default_factory=dict)


def open_tools(config: EvaluateConfig, share: Share, sample: Tensor | None) -> Tools:
    """Networks and real statistics; what is missing is noted. sample: an image, whose size a small network must fit."""
    tools = Tools()

    def attempt(option: str, make: Callable[[], Any]) -> Any:
        try:
            return share.attempt(make)
        except NotMeasurable as reason:
            tools.notes[option] = str(reason)
            return None

    if config.inception is not None:
        tools.network = attempt("features", lambda: Inception(config.inception, share.device))
    elif config.dataset is not None:
        # Never in place of InceptionV3 that was asked for: their distances are not comparable.
        tools.network = attempt(
            "features", lambda: SmallNetwork(*small_network_of(config.dataset, Path(config.cache), share))
        )
        if tools.network is not None and sample is not None and tuple(sample.shape) != tools.network.image_shape:
            size, wanted = tuple(sample.shape), tools.network.image_shape
            tools.notes["features"] = (
                f"images are {size} (channels, height, width), those of dataset={config.dataset} {wanted}. Set dataset=DIR to the "
                "data their model was trained on, or inception=FILE."
            )
            tools.network = None
    if tools.network is None:
        tools.notes.setdefault("features", "there is no feature network. Set inception=FILE, or dataset=DIR.")
    tools.clip = attempt("clip_score", lambda: Clip(config.clip, share.device)) if config.clip else None
    tools.lpips = attempt("lpips", lambda: Lpips(config.lpips, share.device)) if config.lpips else None
    if config.clip is None:
        tools.notes["clip_score"] = "no weights. Set clip=DIR."
    if config.lpips is None:
        tools.notes["lpips"] = "no weights. Set lpips=FILE."
    for entry in config.rewards:
        reward = attempt(entry.partition(":")[2], lambda entry=entry: Reward.load(entry))
        tools.rewards += [reward] if reward is not None else []
    source = config.real or config.dataset
    if source is None:
        tools.notes["real"] = "there are no real images. Set real= to a prepared set, a folder of images or statistics."
    elif attempt("real", lambda: existing(source)) is not None and tools.network is not None:
        cache = Path(config.cache)
        tools.real = attempt(
            "real",
            lambda: real_statistics(source, config.real_split, tools.network, share, config.batch_size, cache),
        )
    return tools


def existing(source: str) -> str:
    """Raises NotMeasurable where this rank does not see it: a folder may be missing on one node alone."""
    if not is_remote(source) and not Path(source).exists():
        raise NotMeasurable(f"real={source} does not exist.")
    return source


def scorers(tools: Tools) -> dict[str, Callable[[list[Tensor], list[str]], Tensor]]:
    found = {} if tools.clip is None else {"clip_score": tools.clip.score}
    return found | {reward.name: reward.score for reward in tools.rewards}
