"""torch.export and ONNX of the three models by the plain calls: any batch, another image size, any image size."""

from pathlib import Path

import pytest
import torch
from tiny import max_difference, random_images, random_noise, scramble, seeded, tiny_config
from torch import Tensor
from torch.export import Dim

from mae_hf import MAEForImageClassification, MAEForPreTraining, MAEModel

INTERPOLATE = {"interpolate_pos_encoding": True}
ANY_BATCH = {0: Dim.DYNAMIC}
ANY_SIZE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def model_of(model_class: type, **fields):
    return scramble(seeded(model_class, tiny_config(num_labels=3, **fields)))


def inputs_of(model, shape: tuple[int, int], batch: int) -> dict[str, Tensor]:
    """Images of this size, and noise with ties for a model that hides patches."""
    config = tiny_config(image_size=shape)
    inputs = {"pixel_values": random_images(config, batch, seed=batch)}
    if isinstance(model, MAEForPreTraining):
        inputs["noise"] = (4 * random_noise(config, batch, seed=batch)).round()
    return inputs


def dynamic(inputs: dict[str, Tensor], of_images: dict, fixed: dict) -> dict:
    return {**dict.fromkeys(inputs, ANY_BATCH), "pixel_values": of_images, **dict.fromkeys(fixed)}


# (model, fields, further arguments, size of the example, what may change of the images, sizes to be run)
CASES = {
    "encoder": (MAEModel, {}, {}, (32, 32), ANY_BATCH, [(32, 32)]),
    "encoder cls": (MAEModel, {"pooling": "cls"}, {}, (32, 32), ANY_BATCH, [(32, 32)]),
    "classifier": (MAEForImageClassification, {}, {}, (32, 32), ANY_BATCH, [(32, 32)]),
    "classifier cls": (MAEForImageClassification, {"pooling": "cls"}, {}, (32, 32), ANY_BATCH, [(32, 32)]),
    "pre-training": (MAEForPreTraining, {}, {}, (32, 32), ANY_BATCH, [(32, 32)]),
    "encoder, another size": (MAEModel, {}, INTERPOLATE, (48, 40), ANY_BATCH, [(48, 40)]),
    "pre-training, another size": (MAEForPreTraining, {}, INTERPOLATE, (48, 40), ANY_BATCH, [(48, 40)]),
    "encoder, any size": (MAEModel, {}, INTERPOLATE, (48, 40), ANY_SIZE, [(32, 32), (64, 16), (24, 88)]),
    "classifier, any size": (MAEForImageClassification, {}, INTERPOLATE, (48, 40), ANY_SIZE, [(32, 32), (64, 16)]),
}


QUICK = {
    "torch.export": ["encoder", "classifier", "pre-training", "encoder, any size"],
    "ONNX": ["encoder cls", "classifier cls", "pre-training", "classifier, any size"],
}


def cases(of: str) -> pytest.MarkDecorator:
    marks = {case: () if case in QUICK[of] else (pytest.mark.slow,) for case in CASES}
    return pytest.mark.parametrize("case", [pytest.param(case, marks=marks[case]) for case in CASES])


@cases("torch.export")
@torch.no_grad()
def test_torch_export(case: str) -> None:
    model_class, fields, arguments, shape, of_images, shapes = CASES[case]
    model = model_of(model_class, **fields)
    inputs = inputs_of(model, shape, batch=2)
    shapes_of = dynamic(inputs, of_images, arguments)
    exported = torch.export.export(model, (), {**inputs, **arguments}, dynamic_shapes=shapes_of).module()
    for shape in shapes:
        for batch in (5, 1):
            inputs = inputs_of(model, shape, batch)
            expected, outputs = model(**inputs, **arguments), exported(**inputs, **arguments)
            assert outputs.keys() == expected.keys()
            for name, output in outputs.items():
                assert max_difference(output, expected[name]) < 1e-5, name


@cases("ONNX")
@torch.no_grad()
def test_onnx(case: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install mae_hf[test]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install mae_hf[test]")
    model_class, fields, arguments, shape, of_images, shapes = CASES[case]
    model = model_of(model_class, **fields)
    inputs = inputs_of(model, shape, batch=2)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model, (), path, kwargs={**inputs, **arguments}, dynamo=True, verbose=False,
        dynamic_shapes=dynamic(inputs, of_images, arguments),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    for shape in shapes:
        for batch in (5, 1):
            inputs = inputs_of(model, shape, batch)
            expected = model(**inputs, **arguments)
            outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            for output, (name, tensor) in zip(outputs, expected.items(), strict=True):
                assert max_difference(torch.from_numpy(output), tensor) < 1e-4, name
