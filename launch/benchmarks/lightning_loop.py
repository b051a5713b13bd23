"""The article's net in Lightning's Trainer: an alternative in `shardstep bench step`.

    python -m shardstep.launch.benchmarks.lightning_loop BATCH_SIZE STEPS PRECISION

Without its logger, progress bar and checkpoints, on the batches of the bare loop. Like that loop, it runs in a separate
process and prints the images per second of its last STEPS steps, after as many to warm up.
"""

import logging
import sys
import warnings
from collections.abc import Iterator

import lightning
import torch
from torch import Tensor
from torch.nn import functional

from shardstep.launch.benchmarks.bare_loop import article_net, images_and_labels, now, random_batch


class Batches(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """Endless random batches."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.images, self.labels = images_and_labels(torch.device("cpu"))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield random_batch(self.images, self.labels, self.batch_size)


class Article(lightning.LightningModule):
    """The net and its loss; records the times after `steps` and after twice as many steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net, self.optimizer = article_net(torch.device("cpu"))
        self.marked_steps, self.marks = (steps, 2 * steps), list[float]()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def on_train_batch_end(self, outputs: object, batch: object, index: int) -> None:
        if index + 1 in self.marked_steps:
            self.marks.append(now(self.device))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def main(arguments: list[str]) -> int:
    """Train and print the images per second."""
    batch_size, steps, precision = int(arguments[0]), int(arguments[1]), arguments[2]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # about the number of loader workers, and the like
    torch.backends.cudnn.benchmark = True
    trainer = lightning.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu", devices=1, max_steps=2 * steps,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    article = Article(steps)
    trainer.fit(article, torch.utils.data.DataLoader(Batches(batch_size), batch_size=None))
    print(steps * batch_size / (article.marks[1] - article.marks[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
