"""Exported models: loaded again from the file alone, they are the original on any batch."""

import json
import re
import subprocess
import zipfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from shardstep.configs.errors import InputError
from shardstep.configs.resolve import ResolvedRecipe
from shardstep.datasets.manifest import Manifest
from shardstep.datasets.reader import Reader
from shardstep.trainer.analysis import export_formats as exporting
from shardstep.trainer.analysis.export_formats import FORMATS, KEY, ExportFailed, WithNormalize, export
from shardstep.trainer.analysis.trained_model import TrainedModel, open_trained_model
from shardstep.trainer.data import make_normalize
from shardstep.trainer.models import MODELS
from shardstep.trainer.optim.losses import build_objective
from shardstep.trainer.run_dir import RunDir
from tests.trainer.models.test_models import build

SIZE = 20  # pixels
OPTIONS: dict[str, dict[str, object]] = {"whitening_cnn": {"widths": [8]}, "mlp": {"hidden": [16]}}


class RandomImages:
    """A reader of 150 images of noise."""

    image_shape = (SIZE, SIZE, 3)
    bad = frozenset[int]()

    def read(self, sample_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = np.random.default_rng(0).integers(0, 256, (150, *self.image_shape), dtype=np.uint8)
        return torch.from_numpy(pixels[sample_ids]), torch.zeros(len(sample_ids), dtype=torch.int64)

    def will_need(self, shards: list[int]) -> None:
        pass


def trained(name: str) -> TrainedModel:
    """A model with its first weights, as if it had been trained."""
    recipe = ResolvedRecipe(
        model={"name": name, "sync_batch_norm": False, **OPTIONS.get(name, {})},
        loss={"name": "mse" if name == "autoencoder" else "cross_entropy", "reduction": "mean"},
    )
    manifest = Manifest(
        classes=["a", "b", "c"],
        samples=3,
        samples_per_class=[1, 1, 1],
        image_mode="RGB",
        image_shape=[3, SIZE, SIZE],
        encodings=["png"],
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.3, 0.25],
        made={},
        shards=[],
        index_sha256="",
    )
    device = torch.device("cpu")
    return TrainedModel(
        run_dir=RunDir(Path()),
        weights=Path(),
        recipe=recipe,
        manifest=manifest,
        image_shape=RandomImages.image_shape,
        module=build(name, (3, SIZE, SIZE), 3, **OPTIONS.get(name, {})).eval(),
        normalize=make_normalize(recipe.data, manifest, RandomImages.image_shape, device),
        objective=build_objective(recipe.loss, recipe.model),
        device=device,
    )


def images() -> Reader:
    return RandomImages()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_model_in_every_format(name: str, model: str, tmp_path: Path) -> None:
    if name == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"model{FORMATS[name].suffix}"
    found = export(trained(model), name, path, images(), np.arange(150))
    assert found.largest <= found.allowed < 0.01
    assert found.images == 128  # 1 + 3 + 60 + 64
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_metadata_say_how_to_use_a_file(tmp_path: Path) -> None:
    one = trained("mlp")
    export(one, "safetensors", tmp_path / "a.safetensors", images(), np.arange(5))
    export(one, "torch_export", tmp_path / "a.pt2", images(), np.arange(5))
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        told = [json.loads(file.metadata()[KEY])]
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(f"{KEY}.json"))
        told.append(json.loads(archive.read(name)))
    for found in told:
        assert found["classes"] == ["a", "b", "c"]
        assert found["input"]["shape"] == ["batch", 3, SIZE, SIZE]
        assert found["input"]["type"] == "uint8"
        assert found["normalize"]["mean"] == [0.4, 0.5, 0.6]


def test_metadata_of_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(trained("mlp"), "onnx", tmp_path / "a.onnx", images(), np.arange(5))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map[KEY])["classes"] == ["a", "b", "c"]
    (pixels,) = session.get_inputs()
    assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(uint8)", ["batch", 3, SIZE, SIZE])


@pytest.mark.parametrize("model", MODELS)
def test_the_batch_of_onnx_has_a_name_by_which_its_size_can_be_fixed(model: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export(trained(model), "onnx", tmp_path / "a.onnx", images(), np.arange(5), "float32")
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("batch", 7)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", options)
    (pixels,), (outputs,) = session.get_inputs(), session.get_outputs()
    assert (pixels.type, pixels.shape) == ("tensor(float)", [7, 3, SIZE, SIZE])
    assert outputs.shape[0] == 7
    assert not re.search(rb"\bs\d+\b", (tmp_path / "a.onnx").read_bytes().partition(b"shardstep")[0])


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
@pytest.mark.parametrize("name", FORMATS)
def test_pixels_are_of_the_type_that_was_asked_for(name: str, pixels: exporting.Pixels, tmp_path: Path) -> None:
    if name == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = tmp_path / f"a{FORMATS[name].suffix}"
    one = trained("mlp")
    found = export(one, name, path, images(), np.arange(150), pixels)
    assert found.largest <= found.allowed
    described = exporting.describe(one, pixels, FORMATS[name].checked_with)
    assert described["input"]["type"] == pixels
    assert described["checked_with"].split() == [FORMATS[name].runtime, version(FORMATS[name].runtime)]
    written, content = json.dumps(described), path.read_bytes()
    assert written.encode() in content or json.dumps(written).encode() in content  # in the header of safetensors
    if name == "torch_export":
        other = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.float32 if pixels == "uint8" else torch.uint8)
        loaded = torch.export.load(path).module()
        with pytest.raises(RuntimeError, match="dtype"):
            loaded(other)


@pytest.mark.drill
@pytest.mark.parametrize("model", MODELS)
def test_ncnn_computes_the_same(model: str, tmp_path: Path) -> None:
    """By its converter pnnx, which takes float32 pixels only; it says in a script how to feed a batch of one."""
    ncnn, pnnx = pytest.importorskip("ncnn"), pytest.importorskip("pnnx")
    one = trained(model)
    export(one, "onnx", tmp_path / "a.onnx", images(), np.arange(5), "float32")
    command = [pnnx.EXEC_PATH, "a.onnx", f"inputshape=[1,3,{SIZE},{SIZE}]f32", "fp16=0"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    taken, returned = map(int, re.findall(r"batch_index=(\d+)", (tmp_path / "a_ncnn.py").read_text()))
    pixels, _ = images().read(np.arange(1))
    with torch.inference_mode():
        expected = one.module(one.normalize(pixels)).numpy()
    given = pixels.permute(0, 3, 1, 2).float().contiguous().numpy()  # (B, H, W, C) -> (B, C, H, W)
    with ncnn.Net() as net:
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        assert net.load_param(str(tmp_path / "a.ncnn.param")) == 0
        assert net.load_model(str(tmp_path / "a.ncnn.bin")) == 0
        with net.create_extractor() as extractor:
            assert extractor.input("in0", ncnn.Mat(given, batch_index=taken).clone()) == 0
            code, outputs = extractor.extract("out0")
            assert code == 0
            difference = np.abs(outputs.numpy(batch_index=returned).reshape(expected.shape) - expected).max()
    assert difference <= exporting.TOLERANCE * max(1.0, np.abs(expected).max())


def test_normalisation_is_inside() -> None:
    # (51 / 255 - 0.4) / 0.2 = -1; (255 / 255 - 0.4) / 0.2 = 3
    module = WithNormalize(torch.nn.Identity(), [0.4], [0.2])
    pixels = torch.tensor([51, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert module(pixels).flatten().tolist() == pytest.approx([-1, 3], abs=1e-6)


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_a_file_that_is_another_model_is_not_left(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FORMATS["safetensors"]

    def load(path: Path) -> exporting.Loaded:
        loaded = right.load(path)
        return lambda pixels: loaded(pixels) + wrong

    monkeypatch.setitem(FORMATS, "safetensors", replace(right, load=load))
    with pytest.raises(ExportFailed, match="differ by up to"):
        export(trained("mlp"), "safetensors", tmp_path / "a.safetensors", images(), np.arange(5))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_traced_is_told(tmp_path: Path) -> None:
    class Branching(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels if pixels.sum() > 0 else -pixels

    one = replace(trained("mlp"), module=Branching())
    with pytest.raises(ExportFailed, match="mlp cannot be exported to torch_export: "):
        export(one, "torch_export", tmp_path / "a.pt2", images(), np.arange(5))
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_libraries_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx, onnxruntime, onnxscript: pip install 'shardstep\[export\]'"):
        export(trained("mlp"), "onnx", tmp_path / "a.onnx", images(), np.arange(5))


def test_a_run_of_the_disk(finished_run: Path, tmp_path: Path) -> None:
    one = open_trained_model(finished_run, "cpu")
    test, reader = one.open_test_set()
    found = export(one, "torch_export", tmp_path / "a.pt2", reader, test.all_ids())
    assert found.images == 53
    # uint8 in, in any batch size, without this code
    loaded = torch.export.load(tmp_path / "a.pt2").module()
    for size in (1, 7):
        assert loaded(torch.zeros(size, 3, 32, 32, dtype=torch.uint8)).shape == (size, 10)
