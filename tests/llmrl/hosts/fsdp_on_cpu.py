"""Makes accelerate run its FSDP2 on the CPU, over gloo; of its own accord it shards on accelerators only."""

import os


def shard_on_cpu(*, efficient_loading=False):
    """An accelerator that shards, for this process; accelerators that are made later in it are the same.

    Args:
        efficient_loading: The first process alone reads the weights.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ |= {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": str(efficient_loading).lower()}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=efficient_loading
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert accelerator.is_fsdp2
    return accelerator
