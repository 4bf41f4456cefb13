"""The process groups of tensor and data parallelism, kept by Megatron, and the view of them that DeepSpeed asks for.

Imported where parallel.tp > 1 only: Megatron takes seconds to import.
"""

import warnings
from datetime import timedelta

import torch.distributed as dist

warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
from megatron.core import parallel_state  # noqa: E402  (it warns while it is imported)


def start_groups(tp: int, timeout: timedelta) -> None:
    """Groups of tp consecutive ranks (inside a node), and across them of the ranks that hold the same slices."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=False,  # second groups beside NCCL's, which nothing here uses
    )


class ParallelUnit:
    """DeepSpeed's `mpu`. It must not have initialize_sequence_parallel: ZeRO would then overlook tensor parallelism."""

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_src_rank(self) -> int:
        return parallel_state.get_tensor_model_parallel_src_rank()

    # All model parallelism here is tensor parallelism.
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        return parallel_state.get_data_parallel_world_size()

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1
