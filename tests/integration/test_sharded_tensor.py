"""torch's ShardedTensor, whose remote shards are RRefs that its workers exchange by RPC."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec

from tests.integration.harness import run_ranks, worker

_ROWS, _COLUMNS = 4, 3


def _rows(shard: Any) -> torch.Tensor:
    return shard.local_value().tensor


def _fill(shards: list[Any]) -> None:
    for shard in shards:
        shard.tensor.fill_(rpc.get_worker_info().id + 1)


def _read_each_others_shards(rank: int, meeting_point: str, placement: str) -> list[Any]:
    dist.init_process_group("gloo", init_method=f"{meeting_point}-gloo", rank=rank, world_size=2)
    with worker(rank, 2, meeting_point):
        spec = ChunkShardingSpec(dim=0, placements=[placement.format(0), placement.format(1)])
        tensor = sharded_tensor.empty(spec, _ROWS, _COLUMNS, init_rrefs=True)
        _fill(tensor.local_shards())
        dist.barrier()
        ((other, shards),) = tensor.remote_shards().items()
        (shard,) = shards
        read = rpc.rpc_sync(shard.owner(), _rows, args=(shard,))
        (metadata,) = [shard.metadata.shard_offsets for shard in [shard.to_here()]]
        found = [other, read.tolist(), metadata]
        # The owner counts on the others' shares until they are dropped.
        del shards, shard, tensor
        dist.barrier()
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("placement", ["rank:{}/cpu", "worker{}/cpu"])
def test_each_worker_reads_the_others_shards(placement: str) -> None:
    for rank, (other, read, offsets) in enumerate(run_ranks(_read_each_others_shards, 2, placement)):
        assert other == 1 - rank
        assert read == [[other + 1] * _COLUMNS] * (_ROWS // 2)
        assert offsets == [other * _ROWS // 2, 0]
