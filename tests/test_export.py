"""torch.export and ONNX of encoder and classifier by the plain calls, for any batch."""

import pytest
import torch
from tiny import max_difference, random_images, scramble, seeded, tiny_config
from torch.export import Dim

from mae_hf import MAEForImageClassification, MAEModel

ANY_BATCH = {"pixel_values": {0: Dim.DYNAMIC}}

pytestmark = [
    pytest.mark.parametrize("model_class", [MAEModel, MAEForImageClassification]),
    pytest.mark.parametrize("pooling", ["mean", "cls"]),
]


def model_and_images(model_class: type, pooling: str):
    model = scramble(seeded(model_class, tiny_config(pooling=pooling, num_labels=3)))
    return model, random_images(model.config, batch=2), random_images(model.config, batch=5, seed=1)


@torch.no_grad()
def test_torch_export(model_class, pooling):
    model, example, images = model_and_images(model_class, pooling)
    exported = torch.export.export(model, (example,), dynamic_shapes=ANY_BATCH).module()
    expected = model(images)
    outputs = exported(images)
    assert outputs.keys() == expected.keys()
    for name, output in outputs.items():
        assert max_difference(output, expected[name]) < 1e-5, name
    assert exported(images[:1])[0].shape[0] == 1


@torch.no_grad()
def test_onnx(tmp_path, model_class, pooling):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install mae_hf[test]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install mae_hf[test]")
    model, example, images = model_and_images(model_class, pooling)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=ANY_BATCH, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for batch in (images, images[:1]):
        expected = model(batch)
        outputs = session.run(None, {"pixel_values": batch.numpy()})
        for output, (name, tensor) in zip(outputs, expected.items(), strict=True):
            assert max_difference(torch.from_numpy(output), tensor) < 1e-5, name
