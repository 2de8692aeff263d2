"""What is predicted: against scikit-image, against slow loops, and through the model."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import max_difference, random_images, random_noise, scramble, seeded, tiny_config
from torch import Tensor, nn

from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from mae_hf.convert import save_checkpoint
from mae_hf.patches import normalize_patches, patchify
from mae_hf.targets import DEFAULT_LOSS, LOSSES, TARGETS, hog, hog_cells, hog_size, loss_of_patches

OTHERS = {
    "hog": {"target": "hog"},
    "features": {"target": "features", "target_size": 20},
    "cosine": {"target": "features", "target_size": 20, "target_loss": "cosine"},
    "tokens": {"target": "tokens", "target_size": 11},
}


def given(config: MAEConfig, batch: int = 2, seed: int = 2) -> Tensor | None:
    """A target of the right kind, or None where the model computes it."""
    generator = torch.Generator().manual_seed(seed)
    if config.target == "features":
        return torch.randn(batch, config.num_patches, config.prediction_size, generator=generator)
    if config.target == "tokens":
        return torch.randint(config.prediction_size, (batch, config.num_patches), generator=generator)
    return None


def of_skimage(image: np.ndarray, patch_shape: tuple[int, int]) -> np.ndarray:
    """HOG of one image (C, H, W) by scikit-image, (N, T) in the order of ours."""
    feature = pytest.importorskip("skimage.feature", reason="the oracle of HOG is scikit-image")
    rows, columns = hog_cells(patch_shape)
    cell = (patch_shape[0] // rows, patch_shape[1] // columns)
    of_channels = [
        feature.hog(channel, 9, cell, (1, 1), block_norm="L2", feature_vector=False)[:, :, 0, 0] for channel in image
    ]
    cells = np.stack(of_channels, axis=2)  # (rows of cells, columns of cells, C, bins)
    patches = []
    for row in range(0, len(cells), rows):
        for column in range(0, cells.shape[1], columns):
            patches.append(cells[row : row + rows, column : column + columns].reshape(-1))
    return np.stack(patches)


@pytest.mark.parametrize(
    ("channels", "image_shape", "patch_shape"),
    [
        (3, (64, 48), (16, 16)),
        (1, (28, 28), (4, 4)),
        (4, (42, 28), (14, 14)),
        (2, (30, 44), (5, 11)),
        (1, (8, 6), (2, 6)),
    ],
)
def test_hog__is_that_of_scikit_image(
    channels: int, image_shape: tuple[int, int], patch_shape: tuple[int, int]
) -> None:
    images = np.random.default_rng(0).normal(size=(2, channels, *image_shape))
    ours = hog(torch.from_numpy(images).float(), patch_shape)
    assert ours.shape == (2, ours.shape[1], hog_size(patch_shape, channels))
    theirs = np.stack([of_skimage(image, patch_shape) for image in images.astype(np.float32).astype(np.float64)])
    assert np.abs(ours.numpy() - theirs).max() < 5e-6


def test_hog__of_a_photograph_is_that_of_scikit_image() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    photo = datasets.load_sample_image("china.jpg")[:416, :640].transpose(2, 0, 1)
    ours = hog(torch.from_numpy(photo.copy()).unsqueeze(0), (16, 16))
    assert np.abs(ours[0].numpy() - of_skimage(photo.astype(np.float64), (16, 16))).max() < 5e-6


def test_hog__flat_patches_are_zero_and_contrast_does_not_matter() -> None:
    assert hog(torch.full((1, 3, 32, 32), 7.0), (8, 8)).abs().max() == 0
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert max_difference(hog(images, (8, 8)), hog(5 * images + 3, (8, 8))) < 1e-4


@pytest.mark.parametrize("direction", range(9))
def test_hog__of_a_ramp_is_its_direction(direction: int) -> None:
    angle = math.pi * (direction + 0.5) / 9
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    inner = hog((x * math.cos(angle) + y * math.sin(angle))[None, None], (4, 4)).view(4, 4, 2, 2, 9)[1:3, 1:3]
    assert torch.allclose(inner[..., direction], torch.ones(()), atol=1e-4)


def test_losses__slow_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, target = (3 * torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    tokens = torch.randint(7, (2, 5), generator=generator)
    slow = {
        "mse": lambda p, t: sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / len(p),
        "l1": lambda p, t: sum(abs(a - b) for a, b in zip(p, t, strict=True)) / len(p),
        "smooth_l1": lambda p, t: (
            sum((a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in zip(p, t, strict=True)) / len(p)
        ),
        "cosine": lambda p, t: 1 - sum(a * b for a, b in zip(p, t, strict=True)) / math.hypot(*p) / math.hypot(*t),
        "cross_entropy": lambda p, t: math.log(sum(math.exp(a) for a in p)) - p[t],
    }
    assert set(slow) == set(LOSSES)
    for name, loss in slow.items():
        against = tokens if name == "cross_entropy" else target
        ours = loss_of_patches(predicted, against, name)
        for b in range(2):
            for n in range(5):
                assert ours[b, n].item() == pytest.approx(
                    loss(predicted[b, n].tolist(), against[b, n].tolist()), rel=1e-4
                )


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("decoder", [{}, {"decoder_type": "cross", "prediction_ratio": 0.5}], ids=["self", "cross"])
def test_loss__is_the_mean_over_the_hidden_patches(fields: dict, decoder: dict) -> None:
    config = tiny_config(**fields, **decoder)
    model = scramble(seeded(MAEForPreTraining, config)).train()
    images, noise, target = random_images(config), random_noise(config), given(config)
    output = model(images, noise=noise, target=target)
    target = hog(images, config.patch_shape) if target is None else target
    predicted = output.ids_predicted
    total = count = 0
    for image in range(2):
        for place in range(output.logits.shape[1]):
            patch = place if predicted is None else int(predicted[image, place])
            if output.mask[image, patch]:
                of_patch = loss_of_patches(
                    output.logits[image, place][None, None], target[image, patch][None, None], config.loss_of_target
                )
                total, count = total + of_patch.item(), count + 1
    assert count == (24 if predicted is None else 12)
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("loss", ["l1", "smooth_l1"])
@pytest.mark.parametrize("normalised", [True, False])
def test_pixels__by_another_loss(loss: str, normalised: bool) -> None:
    config = tiny_config(target_loss=loss, norm_pix_loss=normalised)
    model = seeded(MAEForPreTraining, config)
    images, noise = random_images(config), random_noise(config)
    output = model(images, noise=noise)
    target = patchify(images, config.patch_shape)
    target = normalize_patches(target) if normalised else target
    expected = loss_of_patches(output.logits, target, loss)[output.mask.bool()].mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_sizes_and_losses__of_each_target(target: str) -> None:
    size = {"target_size": 20} if target in ("features", "tokens") else {}
    config = tiny_config(target=target, **size)
    assert config.loss_of_target == DEFAULT_LOSS[target]
    assert config.prediction_size == {"pixel": 192, "hog": 2 * 2 * 3 * 9}.get(target, 20)
    model = seeded(MAEForPreTraining, config)
    assert model.decoder.decoder_pred.out_features == config.prediction_size
    assert model(random_images(config), noise=random_noise(config), return_loss=False).logits.shape == (
        *(2, 16),
        config.prediction_size,
    )


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_checkpoint__comes_back_and_gives_its_encoder(fields: dict, tmp_path: Path) -> None:
    config = tiny_config(**fields, distilled_from="some/teacher")
    model = scramble(seeded(MAEForPreTraining, config))
    model.save_pretrained(tmp_path)
    images, noise, target = random_images(config), random_noise(config), given(config)
    again = MAEForPreTraining.from_pretrained(tmp_path)
    assert torch.equal(again(images, noise=noise, target=target).loss, model(images, noise=noise, target=target).loss)
    assert (again.config.target, again.config.distilled_from) == (config.target, "some/teacher")
    encoder = MAEModel.from_pretrained(tmp_path).eval()
    assert torch.equal(encoder(images).last_hidden_state, model.vit(images).last_hidden_state)
    assert isinstance(MAEForImageClassification.from_pretrained(tmp_path, num_labels=3), nn.Module)


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        ({}, torch.zeros(2, 16, 192), "predicts 'pixel', which it computes of the images: leave target out"),
        (OTHERS["hog"], torch.zeros(2, 16, 108), "predicts 'hog', which it computes"),
        (OTHERS["features"], None, r"predicts 'features': give target \(2, 16, 20\), or return_loss=False"),
        (
            OTHERS["tokens"],
            None,
            r"give target \(batch, patches\) = \(2, 16\) of whole numbers below 11",
        ),
        (OTHERS["features"], torch.zeros(2, 16, 21), r"target is \(2, 16, 21\) of torch.float32, but 'features' are"),
        (OTHERS["features"], torch.zeros(1, 16, 20), "but 'features' are"),
        (OTHERS["features"], torch.zeros(2, 16, 20, dtype=torch.int64), "of torch.int64, but 'features' are"),
        (OTHERS["tokens"], torch.zeros(2, 16), "of torch.float32, but 'tokens' are"),
        (OTHERS["tokens"], torch.zeros(2, 15, dtype=torch.int64), "but 'tokens' are"),
        (OTHERS["tokens"], torch.full((2, 16), 11), "The tokens are from 11 to 11, but the vocabulary is from 0 to 10"),
        (OTHERS["tokens"], torch.full((2, 16), -100), "The tokens are from -100"),
    ],
)
def test_target__that_does_not_fit_is_refused(fields: dict, target: Tensor | None, message: str) -> None:
    config = tiny_config(**fields)
    model = seeded(MAEForPreTraining, config)
    with pytest.raises(ValueError, match=message):
        model(random_images(config), target=target)


@pytest.mark.parametrize("fields", OTHERS.values(), ids=OTHERS)
def test_reconstruct_and_convert__refuse_what_is_no_pixels(fields: dict, tmp_path: Path) -> None:
    config = tiny_config(**fields)
    model = scramble(seeded(MAEForPreTraining, config))
    with pytest.raises(ValueError, match=f"predicts '{config.target}', of which no picture can be made"):
        model.reconstruct(random_images(config))
    for to, name in (("vit_mae", "folder"), ("original", "file.pth")):
        with pytest.raises(ValueError, match=f"predicts '{config.target}': the decoder of {to} predicts pixels"):
            save_checkpoint(model, tmp_path / name, to)
    save_checkpoint(model, tmp_path / "vit", "vit")


def test_targets__in_16_bits_are_compared_in_32() -> None:
    for fields in OTHERS.values():
        config = tiny_config(**fields)
        model = scramble(seeded(MAEForPreTraining, config))
        images, noise, target = random_images(config), random_noise(config), given(config)
        exact = model(images, noise=noise, target=target).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, noise=noise, target=target).loss
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=0.03)


def test_head_without_blocks__each_patch_by_its_own_latent(tmp_path: Path) -> None:
    """SimMIM's: the encoder, which sees mask tokens, has done all the mixing."""
    config = tiny_config(
        mask_tokens_in_encoder=True, decoder_num_hidden_layers=0, target_loss="l1", norm_pix_loss=False
    )
    model = scramble(seeded(MAEForPreTraining, config))
    images, noise = random_images(config), random_noise(config)
    output = model(images, noise=noise)
    decoder, ids_keep = model.decoder, output.ids_restore.argsort(dim=1)[:, :4]
    latent = model.vit(images, ids_keep=ids_keep, mask_token=model.encoder_mask_token).last_hidden_state
    tokens = decoder.decoder_embed(latent) + decoder.decoder_pos_embed
    expected = decoder.decoder_pred(decoder.decoder_norm(tokens[:, 1:]))
    assert torch.allclose(output.logits, expected, atol=1e-5)
    hidden = output.mask.bool()
    error = (expected - patchify(images, config.patch_shape)).abs()[hidden].mean()
    assert output.loss.item() == pytest.approx(error.item(), rel=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(MAEForPreTraining.from_pretrained(tmp_path)(images, noise=noise).loss, output.loss)
