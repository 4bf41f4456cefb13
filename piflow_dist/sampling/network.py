"""The network of a request: whole on its device, split over a tensor-parallel group, or sharded over all ranks."""

from piflow_dist.config import ParallelConfig
from piflow_dist.distill.objectives import Network
from piflow_dist.models.pretrained import open_model
from piflow_dist.models.weights import check_fits
from piflow_dist.parallel.loading import load_slices
from piflow_dist.parallel.topology import Topology
from piflow_dist.sampling.settings import SampleRequest


def load_network(request: SampleRequest, topology: Topology) -> Network:
    """Every rank reads only what it keeps. Raises CheckpointError and ConfigError for weights that are damaged or of others."""
    config, dtype = request.config, request.dtype
    merged_on = topology.device if config.merge else None
    module, source = open_model(request.checkpoint, request.run, config.ema, merged_on)
    module.requires_grad_(False).eval()
    if config.parallel.shard_base:
        from piflow_dist.parallel.zero import FrozenModel

        return FrozenModel(module, source, topology, ParallelConfig(tp=topology.tp), dtype)
    check_fits(module, source)
    if topology.tp > 1:
        from piflow_dist.parallel.tensor import split_layers

        split_layers(module, topology.mpu.get_tensor_model_parallel_group())
    load_slices(module, source, topology, request.torch_dtype)
    if config.compile:
        module.compile()
    return module
