"""The segmenter: scores of every pixel, what its loss counts, and that its checkpoints are whole."""

from pathlib import Path

import pytest
import torch
from tiny import max_difference, random_images, scramble, seeded, tiny_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from mae_hf import MAEConfig, MAEForPreTraining, MAEForSemanticSegmentation, MAEModel
from mae_hf.modeling_segmentation import PixelClassifier
from mae_hf.training.optim import layerwise_groups

HEADS = [
    {"segmentation_head": "upernet", "segmentation_channels": 16},
    {"segmentation_head": "upernet", "segmentation_channels": 16, "segmentation_norm": "layer"},
    {"segmentation_head": "linear"},
]


def segmenter_config(**fields: object) -> MAEConfig:
    return tiny_config(**{"num_labels": 5, "num_hidden_layers": 4, "segmentation_channels": 16, **fields})


def labels_of(images: Tensor, classes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(classes, (len(images), *images.shape[-2:]), generator=generator)


@pytest.mark.parametrize("fields", HEADS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 56), (37, 50), (5, 90)])
def test_forward__scores_of_every_pixel_of_images_of_any_size(fields: dict, height: int, width: int) -> None:
    model = seeded(MAEForSemanticSegmentation, segmenter_config(**fields))
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    output = model(images, labels=labels_of(images))
    assert output.logits.shape == (2, 5, height, width)
    assert output.loss.isfinite()
    # What is filled up lies on the right and below, and is all that the size changes.
    filled = F.pad(images, (0, -width % 16, 0, -height % 16))
    if fields["segmentation_head"] == "linear":  # which looks at single patches
        filled = F.pad(images, (0, -width % 8, 0, -height % 8))
    assert output.logits.equal(model(filled).logits[..., :height, :width])


@pytest.mark.parametrize("fields", HEADS)
def test_gradients__reach_every_weight(fields: dict) -> None:
    model = seeded(MAEForSemanticSegmentation, segmenter_config(**fields)).train()
    images = random_images(model.config)
    model(images, labels=labels_of(images)).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_loss__is_the_mean_over_the_images_of_that_over_the_pixels_that_have_a_class() -> None:
    config = segmenter_config(semantic_loss_ignore_index=200, auxiliary_loss_weight=0.0)
    model = scramble(seeded(MAEForSemanticSegmentation, config))
    images = random_images(config)
    labels = labels_of(images)
    labels[0, :20] = 200
    output = model(images, labels=labels)
    log_shares = output.logits.log_softmax(dim=1)
    slow: list[list[float]] = [[], []]
    for image in range(2):
        for row in range(32):
            for column in range(32):
                if (label := int(labels[image, row, column])) != 200:
                    slow[image].append(-log_shares[image, label, row, column].item())
    assert [len(losses) for losses in slow] == [12 * 32, 32 * 32]
    expected = sum(sum(losses) / len(losses) for losses in slow) / 2
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    alone = [model(images[i : i + 1], labels=labels[i : i + 1]).loss.item() for i in range(2)]
    assert sum(alone) / 2 == pytest.approx(expected, rel=1e-5), "however a batch is divided"
    # Nothing is known of any pixel: no NaN.
    nothing = model(images, labels=torch.full_like(labels, 200)).loss
    assert nothing.item() == 0
    nothing.backward()


def test_auxiliary_head__has_its_share_of_the_loss() -> None:
    images = random_images(segmenter_config())
    losses = []
    for weight in (0.4, 0.8):
        model = seeded(MAEForSemanticSegmentation, segmenter_config(auxiliary_loss_weight=weight))
        losses.append(model(images, labels=labels_of(images)).loss)
    without = seeded(MAEForSemanticSegmentation, segmenter_config(auxiliary_loss_weight=0.0))
    assert without.auxiliary_head is None
    without.load_state_dict(model.state_dict(), strict=False)
    alone = without(images, labels=labels_of(images)).loss
    assert (losses[1] - alone).item() == pytest.approx(2 * (losses[0] - alone).item(), rel=1e-5)


def test_upernet__is_that_of_transformers() -> None:
    """The same maps and weights through the whole model of transformers, whose backbone is ours."""
    config = segmenter_config(segmentation_dropout=0.0)
    model = scramble(seeded(MAEForSemanticSegmentation, config)).train()
    of_backbone = segmenter_config(out_features=["p2", "p3", "p4", "p5"], pyramid="blocks")
    words = {"hidden_size": 16, "num_labels": 5, "auxiliary_channels": 256}
    other = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=of_backbone, **words)).train()
    for part, own in ((other.backbone.vit, model.vit), (other.backbone.pyramid, model.pyramid)):
        part.load_state_dict(own.state_dict())
    for part, own in ((other.decode_head, model.decode_head), (other.auxiliary_head, model.auxiliary_head)):
        part.load_state_dict({key.replace("classifier.1.", "classifier."): v for key, v in own.state_dict().items()})
    images = random_images(config)
    found, expected = (each(images, labels=labels_of(images)) for each in (model, other))
    assert max_difference(found.logits, expected.logits) < 1e-5
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_layer_norm__an_image_is_the_same_in_any_batch() -> None:
    model = seeded(MAEForSemanticSegmentation, segmenter_config(segmentation_norm="layer", segmentation_dropout=0.0))
    images = random_images(model.config, batch=3)
    together = model.train()(images).logits
    assert max_difference(together[1:2], model(images[1:2]).logits) < 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("fields", HEADS)
def test_from_pretrained__bit_equal_and_nothing_is_left_uninitialised(fields: dict, tmp_path: Path) -> None:
    model = scramble(seeded(MAEForSemanticSegmentation, segmenter_config(**fields))).train()
    images = random_images(model.config)
    model(images)  # moves the statistics of the batch norms
    model.eval().save_pretrained(tmp_path)
    loaded, info = MAEForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())
    # Not to the last bit: kernels choose by where in memory a weight begins, and in a file it begins anywhere.
    assert max_difference(loaded(images).logits, model(images).logits) < 1e-6
    # Others take its encoder, and leave the rest without a word.
    encoder, info = MAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert encoder.layers[2].mlp.fc1.weight.equal(model.vit.layers[2].mlp.fc1.weight)


@pytest.mark.parametrize("fields", HEADS)
def test_pretrained_encoder__under_a_new_head(fields: dict, tmp_path: Path) -> None:
    before = scramble(seeded(MAEForPreTraining, tiny_config(num_hidden_layers=4)))
    before.save_pretrained(tmp_path)
    words = {"num_labels": 5, "segmentation_channels": 16, **fields}
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, info = MAEForSemanticSegmentation.from_pretrained(tmp_path, **words, output_loading_info=True)
        assert all(name.startswith(("pyramid.", "decode_head.", "auxiliary_head.")) for name in info["missing_keys"])
        for name, weight in before.vit.state_dict().items():
            assert weight.equal(model.vit.state_dict()[name]), name
        assert all(value.isfinite().all() for value in model.state_dict().values())
        assert all(weight.requires_grad for weight in model.parameters())
        heads.append(next(module for module in model.modules() if isinstance(module, PixelClassifier)))
    assert not heads[0].weight.equal(heads[1].weight)
    assert heads[0].weight.std().item() == pytest.approx(0.01, rel=0.3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.running_var.eq(1).all() and norm.running_mean.eq(0).all() for norm in norms)
    assert all(norm.num_batches_tracked == 0 for norm in norms)


def test_layer_decay__everything_above_the_encoder_is_one_layer() -> None:
    model = seeded(MAEForSemanticSegmentation, segmenter_config())
    rates = {id(p): group["lr_scale"] for group in layerwise_groups(model, 0.05, 0.5) for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = 0 if ".embeddings." in name else 1 + int(name.split(".")[2]) if ".layers." in name else 5
        assert rates[id(parameter)] == 0.5 ** (5 - layer), name


def test_labels__of_another_size_are_refused() -> None:
    model = seeded(MAEForSemanticSegmentation, segmenter_config())
    images = random_images(model.config)
    with pytest.raises(ValueError, match=r"labels are \(2, 16, 16\), but must be .* \(2, 32, 32\)"):
        model(images, labels=labels_of(images)[:, ::2, ::2])


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("segmentation_head", "unet", "must be 'upernet' or 'linear'"),
        ("segmentation_norm", "group", "must be 'batch' or 'layer'"),
        ("segmentation_channels", 0, "must be an int of at least 1"),
        ("segmentation_dropout", 1.0, "must be at least 0 and below 1"),
        ("auxiliary_loss_weight", -1.0, "must be at least 0"),
        ("semantic_loss_ignore_index", "none", "must be an int"),
    ],
)
def test_config__refuses(field: str, value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"{field} {sentence}"):
        tiny_config(**{field: value})
