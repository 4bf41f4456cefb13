"""The images of a sampling request, made in the test's own process."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from piflow_dist.parallel.topology import Topology
from piflow_dist.sampling.embeddings import EmbeddingCache
from piflow_dist.sampling.network import load_network
from piflow_dist.sampling.sampler import Sampler
from piflow_dist.sampling.settings import SampleRequest


def sample_here(request: SampleRequest) -> tuple[Sampler, Tensor]:
    """The sampler, and latents (B,C,H,W) in the request's order."""
    device, made = torch.device("cpu"), {}
    with tempfile.TemporaryDirectory() as folder:
        cache = EmbeddingCache(Path(folder), request.dataset.prompt_encoder)
        assert cache.encode([*(image.prompt for image in request.images), ""], device) == {}
        sampler = Sampler(request, load_network(request, Topology(0, 1, 0, device)), cache, device)
        for piece in sampler.pieces(request.images):
            made |= zip(piece, sampler.sample(piece), strict=True)
    return sampler, torch.stack([made[image] for image in request.images])
