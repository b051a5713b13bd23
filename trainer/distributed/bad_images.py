"""Images that cannot be decoded and are skipped, see data.on_bad_image: how many on all ranks, and which were the first."""

import numpy as np
import torch
from accelerate import Accelerator

from shardstep.datasets.batches import TrainBatches
from shardstep.datasets.manifest import ShardFolder
from shardstep.datasets.parts import Part
from shardstep.datasets.reader import Reader
from shardstep.trainer.distributed.collectives import gather_samples, reduce_sums
from shardstep.trainer.state import TrainState

_MOST_NAMED = 5  # a run may meet thousands


def count_skipped(accelerator: Accelerator, batches: TrainBatches, shards: ShardFolder, state: TrainState) -> None:
    """Add what the training of all ranks has skipped since the last call to the state. All ranks."""
    skipped, batches.skipped = batches.skipped, []
    (total,) = reduce_sums(accelerator, [torch.tensor([len(skipped)], device=accelerator.device).double()])
    if not total.item():
        return
    state.bad_images += int(total.item())
    first_places = {sample_id: (epoch, position, sample_id) for epoch, position, sample_id in reversed(skipped)}
    first = torch.tensor(sorted(first_places.values())[:_MOST_NAMED], dtype=torch.int64, device=accelerator.device)
    for epoch, position, sample_id in sorted(gather_samples(accelerator, first.view(-1, 3)).tolist()):
        name = _name(shards, sample_id)
        is_known = any(one | name == one for one in state.first_bad_images)
        if not is_known and len(state.first_bad_images) < _MOST_NAMED:
            # Anew: a checkpoint of this list may be being written.
            state.first_bad_images = [*state.first_bad_images, {"epoch": epoch, "position": position, **name}]


def first_left_out(accelerator: Accelerator, reader: Reader, part: Part) -> list[dict[str, str]]:
    """Return shard and key of the first samples of a part that evaluation left out on any rank. All ranks."""
    own = np.intersect1d(np.array(sorted(reader.bad), dtype=np.int64), part.all_ids())[:_MOST_NAMED]
    found = gather_samples(accelerator, torch.from_numpy(own).to(accelerator.device))
    return [_name(part.shards, sample_id) for sample_id in sorted(set(found.tolist()))[:_MOST_NAMED]]


def _name(shards: ShardFolder, sample_id: int) -> dict[str, str]:
    return {"shard": str(shards.path_of(sample_id)), "key": shards.key(sample_id)}
