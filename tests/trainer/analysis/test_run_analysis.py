"""What a report shows of a run: predictions, mistakes, filters, and what is left out."""

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from shardstep.configs.errors import InputError
from shardstep.configs.resolve import with_keys
from shardstep.trainer.analysis.filters import first_filters
from shardstep.trainer.analysis.predictions import Predictions, predict_test_set
from shardstep.trainer.analysis.run_analysis import analyse_run
from shardstep.trainer.analysis.run_record import read_record
from shardstep.trainer.analysis.trained_model import open_trained_model
from shardstep.trainer.run_dir import RunDir, find_weights
from tests.runs import spoil_weights, train_ranks, write_recipe


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def move_test_set(run: Path, place: str) -> None:
    """Make a run believe that its test set is somewhere else."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["data"]["test"] = place
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def test_predictions_agree_with_the_run(run: Path) -> None:
    found = analyse_run(read_record(run), "cpu")
    assert found.left_out == []
    assert found.weights == "the final weights"
    assert found.predictions is not None
    last = found.record.last_evaluation
    assert found.predictions.accuracy == last["accuracy"]
    assert found.per_class_accuracy == last["per_class_accuracy"]
    assert sum(part.samples for part in found.bins) == 53
    assert found.filters is not None
    assert found.filters.shape == (24, 2, 2, 3)  # 2 x 12 whitening filters
    assert len(found.mistakes) == min(24, int((~found.predictions.correct).sum())) > 0


def test_the_surest_mistakes_come_first() -> None:
    found = Predictions(
        labels=np.array([0, 1, 1, 0]),
        predicted=np.array([1, 1, 0, 1]),
        confidence=np.array([0.6, 0.9, 0.8, 0.7], dtype=np.float32),
        errors=np.zeros(0, dtype=np.float32),
    )
    assert found.most_confident_mistakes(2).tolist() == [2, 3]  # 1 is right
    assert found.confusion(2).tolist() == [[0, 2], [1, 1]]
    assert found.per_class_accuracy(3) == [0.0, 0.5, None]
    assert found.most_frequent_mistakes(5) == [(0, 1, 2), (1, 0, 1)]  # 0 for 1 twice
    assert found.most_frequent_mistakes(1) == [(0, 1, 2)]
    assert found.accuracy == 0.25


def test_predictions_are_made_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = open_trained_model(run, "cpu")
    first = predict_test_set(trained, RunDir(run).predictions_path, pytest.fail)
    calls = []
    trained.module.register_forward_hook(lambda *_: calls.append(1))
    again = predict_test_set(trained, RunDir(run).predictions_path, pytest.fail)
    assert not calls
    assert np.array_equal(again.confidence, first.confidence)
    RunDir(run).predictions_path.write_bytes(RunDir(run).predictions_path.read_bytes()[:500])  # damaged: made anew
    predict_test_set(trained, RunDir(run).predictions_path, pytest.fail)
    assert calls
    calls.clear()
    other = open_trained_model(run / "checkpoints" / "step-00000004", "cpu")  # other weights: made anew
    assert predict_test_set(other, RunDir(run).predictions_path, pytest.fail).confidence[0] != first.confidence[0]


def test_predictions_are_of_the_views_that_the_recipe_evaluates_with(run: Path) -> None:
    trained, cache = open_trained_model(run, "cpu"), RunDir(run).predictions_path
    plain = predict_test_set(trained, cache, pytest.fail)
    trained = replace(trained, recipe=with_keys(trained.recipe, eval={"views": "mirror"}))
    mirror = predict_test_set(trained, cache, pytest.fail)  # not what is kept
    _, reader = trained.open_test_set()
    images = trained.normalize(reader.read(np.arange(53))[0])
    with torch.inference_mode():
        outputs = (trained.module(images) + trained.module(images.flip(3))) / 2
    assert mirror.confidence == pytest.approx(outputs.softmax(dim=1).amax(dim=1).numpy(), abs=1e-5)
    assert mirror.confidence != pytest.approx(plain.confidence, abs=1e-5)
    sure_above = float(np.median(plain.confidence))
    trained = replace(trained, recipe=with_keys(trained.recipe, eval={"sure_above": sure_above}))
    unsure = plain.confidence < sure_above
    some = predict_test_set(trained, cache, pytest.fail)
    assert some.confidence == pytest.approx(np.where(unsure, mirror.confidence, plain.confidence), abs=1e-5)


def test_damaged_predictions_are_made_anew(run: Path) -> None:
    trained, cache = open_trained_model(run, "cpu"), RunDir(run).predictions_path
    found = predict_test_set(trained, cache, pytest.fail)
    whole = cache.read_bytes()
    calls = []
    trained.module.register_forward_hook(lambda *_: calls.append(1))
    part = zipfile.ZipFile(cache).getinfo("confidence.npy")
    cache.write_bytes(flipped(whole, part.header_offset + 60 + part.compress_size // 2))  # behind its header
    again = predict_test_set(trained, cache, pytest.fail)
    assert calls
    assert np.array_equal(again.confidence, found.confidence)
    assert cache.read_bytes() == whole
    for place in range(0, len(whole), 89):  # whatever it is a part of; some bytes, such as dates, matter to nobody
        cache.write_bytes(flipped(whole, place))
        assert np.array_equal(predict_test_set(trained, cache, pytest.fail).confidence, found.confidence)


def flipped(content: bytes, place: int) -> bytes:
    """The same, with one byte flipped."""
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


@pytest.mark.parametrize("cut", [("confidence",), ("labels", "predicted", "confidence")])
def test_predictions_of_another_number_of_samples_are_made_anew(run: Path, cut: tuple[str, ...]) -> None:
    trained, cache = open_trained_model(run, "cpu"), RunDir(run).predictions_path
    predict_test_set(trained, cache, pytest.fail)
    kept = dict(np.load(cache))
    np.savez_compressed(cache, **kept | {name: kept[name][:-1] for name in cut})
    found = predict_test_set(trained, cache, pytest.fail)
    assert len(found.labels) == len(found.predicted) == len(found.confidence) == 53


def test_a_test_set_that_is_gone(run: Path) -> None:
    move_test_set(run, "nowhere")
    found = analyse_run(read_record(run), "cpu")
    (told,) = found.left_out
    assert told.startswith("predictions for the test set: no shards in nowhere")
    assert found.per_class_accuracy == found.record.last_evaluation["per_class_accuracy"]
    assert found.filters is not None


def test_predictions_outlive_the_test_set(run: Path) -> None:
    before = analyse_run(read_record(run), "cpu")
    move_test_set(run, "nowhere")
    found = analyse_run(read_record(run), "cpu")
    assert found.predictions is not None
    assert before.predictions is not None
    assert np.array_equal(found.predictions.predicted, before.predictions.predicted)
    assert not found.mistakes
    assert [told.partition(":")[0] for told in found.left_out] == ["test images"]


def test_a_folder_that_cannot_be_written_is_no_mistake(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("shardstep.trainer.analysis.predictions.write_atomically", refuse)
    found = analyse_run(read_record(run), "cpu")
    assert found.predictions is not None
    assert found.left_out == [
        f"{RunDir(run).predictions_path} could not be written, the predictions will be computed again: Read-only file system"
    ]


def test_weights_of_a_run_that_is_not_finished(run: Path) -> None:
    (run / "model.safetensors").unlink()
    (run / "summary.json").unlink()
    assert analyse_run(read_record(run), "cpu").weights == "the checkpoint step-00000008"
    newest = run / "checkpoints" / "step-00000008" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert find_weights(run)[0].parent.name == "step-00000004"  # the newest that is whole
    with pytest.raises(InputError, match=r"step-00000008 is damaged: model\.safetensors has"):
        find_weights(newest.parent)
    shutil.rmtree(run / "checkpoints")
    found = analyse_run(read_record(run), "cpu")
    assert found.left_out == [
        f"predictions for the test set, and filters: {run} has neither model.safetensors nor an intact checkpoint yet"
    ]


def test_a_run_of_an_older_format_is_shown_as_far_as_it_goes(run: Path) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content["train"]["gone"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(content))
    found = analyse_run(read_record(run), "cpu")
    assert found.record.evaluations
    assert len(found.left_out) == 2
    assert "another version of shardstep" in found.left_out[0]
    assert "train.gone is not a key" in found.left_out[1]


def test_weights_that_are_no_numbers_are_told(run: Path) -> None:
    spoil_weights(run, "head.weight")
    found = analyse_run(read_record(run), "cpu")
    assert found.left_out == ["predictions for the test set: some outputs are NaN or infinite"]
    assert found.predictions is None


def test_an_autoencoder_shows_its_worst_reconstructions(shards: Path, tmp_path: Path) -> None:
    model = {"name": "autoencoder", "widths": [4, 4]}
    recipe = write_recipe(tmp_path, shards, model=model, loss={"name": "mse"}, train={"duration": "1 epochs"})
    train_ranks(1, recipe)
    found = analyse_run(read_record(tmp_path / "run"), "cpu")
    assert found.left_out == []
    assert found.predictions is not None
    written = json.loads((tmp_path / "run" / "summary.json").read_text())["eval"]["loss"]
    assert found.predictions.errors.mean() == pytest.approx(written, rel=1e-5)
    errors = [pair.error for pair in found.reconstructions]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == found.predictions.errors.max()
    assert found.reconstructions[0].original.shape == found.reconstructions[0].reconstruction.shape == (32, 32, 3)


def test_filters_by_hand() -> None:
    layer = torch.nn.Conv2d(1, 2, kernel_size=2)
    with torch.no_grad():
        layer.weight[0, 0] = torch.tensor([[0.0, 2.0], [-2.0, 1.0]])
        layer.weight[1] = 0
    found = first_filters(torch.nn.Sequential(layer), (8, 8, 1))
    assert isinstance(found, np.ndarray)
    # 255 (0.5 + 0.5 w / 2): 0 -> 127.5, rounded to even, 2 -> 255, -2 -> 0, 1 -> 191.25
    assert found[0, :, :, 0].tolist() == [[128, 255], [0, 191]]
    assert (found[1] == 128).all()


def test_filters_of_a_linear_layer_have_the_shape_of_the_image() -> None:
    layer = torch.nn.Linear(3 * 2 * 4, 5)  # channels first, as the models flatten
    found = first_filters(torch.nn.Sequential(torch.nn.Flatten(), layer), (2, 4, 3))
    assert isinstance(found, np.ndarray)
    assert found.shape == (5, 2, 4, 3)
    largest = int(layer.weight[0].abs().argmax())  # channel, row, column
    channel, row, column = np.unravel_index(largest, (3, 2, 4))
    assert found[0, row, column, channel] in (0, 255)


def test_layers_without_pictures_say_why() -> None:
    lstm = torch.nn.LSTM(4, 4)
    assert first_filters(lstm, (8, 8, 3)) == "the first layer is a LSTM, whose weights are not images"
    assert "takes 5 channels" in str(first_filters(torch.nn.Conv2d(5, 2, 3), (8, 8, 3)))
