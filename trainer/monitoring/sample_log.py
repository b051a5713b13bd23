"""Log the samples that a rank consumes: the evidence for "the same samples at every step, for any number of ranks"."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from shardstep.datasets.batches import GlobalBatch, MicroBatch
from shardstep.datasets.manifest import ShardFolder


class SampleLog:
    """Writes samples-rankN.jsonl: epoch, step, position and key of every sample, in the order of consumption."""

    def __init__(self, folder: Path, rank: int, shards: ShardFolder):
        self._file = (folder / f"samples-rank{rank}.jsonl").open("a")
        self._shards = shards

    def watch(self, batch: GlobalBatch, step: int) -> GlobalBatch:
        """Return the same batch, which logs its samples as they are consumed; `step` is the one they lead to."""
        return dataclasses.replace(batch, micro_batches=self._watched(batch, step))

    def _watched(self, batch: GlobalBatch, step: int) -> Iterator[MicroBatch]:
        for micro in batch.micro_batches:
            for position, sample_id in zip(micro.positions.tolist(), micro.sample_ids.tolist(), strict=True):
                line = {"epoch": batch.epoch, "step": step, "position": position, "key": self._shards.key(sample_id)}
                self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            yield micro
