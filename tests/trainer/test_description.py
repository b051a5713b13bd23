"""What a run warns of before its first step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from shardstep.configs.schema import TrainConfig
from shardstep.trainer.description import warnings_about
from shardstep.trainer.models.batch_norm import convert_batch_norm
from shardstep.trainer.optim.plan import make_plan


def warnings_of(model: nn.Module, ranks: int = 1, samples: int = 101, **train: Any) -> list[str]:
    config = TrainConfig(**train)
    plan = make_plan(config, samples, False, ranks)
    recipe, state = SimpleNamespace(train=config), SimpleNamespace(module=model)
    elsewhere = SimpleNamespace(is_main_process=False)
    run = SimpleNamespace(plan=plan, recipe=recipe, state=state, accelerator=elsewhere)
    return warnings_about(run)  # type: ignore[arg-type]


def network(batch_norm: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *([] if batch_norm == "none" else [nn.BatchNorm2d(4)]))
    convert_batch_norm(model, synchronised=batch_norm == "over all ranks")
    return model


@pytest.mark.parametrize(
    ("batch_norm", "ranks", "batch", "max_micro_batch", "samples", "remedy"),
    [
        ("of a rank", 1, 32, 2048, None, None),
        ("of a rank", 6, 32, 2048, None, None),  # shares of 5 and 6
        ("of a rank", 7, 32, 2048, 4, "model.sync_batch_norm=true normalises over all ranks' 32"),  # of 4 and 5
        ("of a rank", 32, 32, 2048, 1, "model.sync_batch_norm=true normalises over all ranks' 32"),
        ("of a rank", 7, 32, 4, 1, "train.max_micro_batch"),  # 4 on each, then 1 or none
        ("over all ranks", 32, 32, 2048, None, None),
        ("none", 32, 32, 2048, None, None),
        ("of a rank", 1, 1, 2048, 1, "train.global_batch_size"),
        ("of a rank", 2, 4, 2048, 2, "train.global_batch_size"),
        ("over all ranks", 2, 4, 2048, 4, "train.global_batch_size"),
        ("over all ranks", 5, 5, 2048, None, None),
        ("of a rank", 1, 32, 2, 2, "train.max_micro_batch"),
        ("of a rank", 1, 66, 64, 2, "train.max_micro_batch"),  # 64 and 2
        ("of a rank", 2, 32, 2, 2, "train.max_micro_batch"),
        ("over all ranks", 2, 32, 2, 4, "train.max_micro_batch"),
        ("over all ranks", 4, 32, 2, None, None),
        ("of a rank", 2, 33, 2048, None, None),  # the last batch of an epoch, of 2, is one of four
        ("of a rank", 32, "full", 2048, 3, "model.sync_batch_norm=true normalises over all ranks' 101"),
    ],
)
def test_batch_norm_over_few_samples_is_a_warning_with_a_remedy(
    batch_norm: str, ranks: int, batch: int | str, max_micro_batch: int, samples: int | None, remedy: str | None
) -> None:
    found = warnings_of(network(batch_norm), ranks, global_batch_size=batch, max_micro_batch=max_micro_batch)
    assert len(found) == (0 if samples is None else 1)
    if found:
        assert f"micro-batches of {samples} sample" in found[0]
        assert str(remedy) in found[0]
        assert "\n" not in found[0]


@pytest.mark.parametrize(("above", "warns"), [(None, False), (0, False), (1, True), (60, True)])
def test_more_threads_than_there_are_is_a_warning(above: int | None, warns: bool) -> None:
    threads = torch.get_num_threads()
    found = warnings_of(network("none"), global_batch_size=32, threads=None if above is None else threads + above)
    assert len(found) == warns
    if found and above is not None:
        assert found[0].startswith(f"train.threads={threads + above}, but each rank uses {threads} thread")
