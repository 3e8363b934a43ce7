"""Makes accelerate run its FSDP2 on the CPU, over gloo; of its own accord it shards on accelerators only."""

import os


def take_as_sharding(*, efficient_loading=False):
    """The accelerators of this process shard from now on.

    Args:
        efficient_loading: The first process alone reads the weights.
    """
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(efficient_loading).lower()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=efficient_loading,
        state_dict_type="FULL_STATE_DICT",
    )
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def shard_on_cpu(*, efficient_loading=False):
    """An accelerator that shards."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    take_as_sharding(efficient_loading=efficient_loading)
    assert accelerator.is_fsdp2
    return accelerator
