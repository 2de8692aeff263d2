"""Attention within windows: against slow loops, ViTDet as transformers has it, and the plain model."""

import pytest
import torch
from tiny import max_difference, random_images, random_noise, scramble, seeded, tiny_config
from torch import Tensor
from transformers import VitDetConfig, VitDetModel

from mae_hf import MAEForPreTraining, MAEModel
from mae_hf.layers import MAELayer
from mae_hf.windows import Windows

GRIDS = [(4, 4, 2), (5, 7, 3), (3, 8, 4), (6, 2, 5)]  # rows, columns, size of a window


def numbered(rows: int, columns: int, prefix: int) -> Tensor:
    """Tokens (2, prefix + rows * columns, 1) that all differ."""
    return torch.arange(2.0 * (prefix + rows * columns)).add(1).reshape(2, -1, 1)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize(("rows", "columns", "size"), GRIDS)
def test_windows__split_as_a_slow_loop_and_join_again(rows: int, columns: int, size: int, prefix: int) -> None:
    tokens, windows = numbered(rows, columns, prefix), Windows(size, (rows, columns), prefix)
    slow = []
    for image in tokens[..., 0].tolist():
        for top in range(0, rows, size):
            for left in range(0, columns, size):
                inside = [(row, column) for row in range(top, top + size) for column in range(left, left + size)]
                patches = [
                    image[prefix + row * columns + column] if row < rows and column < columns else 0.0
                    for row, column in inside
                ]
                slow.append(image[:prefix] + patches)
    split = windows.split(tokens)
    assert split[..., 0].tolist() == slow
    assert len(slow) == 2 * windows.shape[0] * windows.shape[1]
    assert windows.join(split).equal(tokens)


def test_windows__what_they_make_of_the_class_token_is_averaged() -> None:
    windows = Windows(2, (4, 4), 1)
    split = windows.split(numbered(4, 4, 1))
    split[:, 0, 0] = torch.arange(8.0)  # of four windows in each of two images
    assert windows.join(split)[:, 0, 0].tolist() == [1.5, 5.5]


def test_layer__attends_within_windows_as_one_window_after_another() -> None:
    config = tiny_config()
    layer = scramble(MAELayer(config, 32, 2, 64)).eval()
    tokens = torch.randn(2, 1 + 5 * 7, 32, generator=torch.Generator().manual_seed(0))
    mixed, _ = layer(tokens, windows=Windows(3, (5, 7), 1))

    normed, expected, of_class = layer.layernorm_before(tokens), tokens.clone(), []
    for top in range(0, 5, 3):
        for left in range(0, 7, 3):
            window = torch.zeros(2, 1 + 9, 32)
            window[:, 0] = normed[:, 0]
            inside = [(r, c) for r in range(3) for c in range(3) if top + r < 5 and left + c < 7]
            for r, c in inside:
                window[:, 1 + 3 * r + c] = normed[:, 1 + (top + r) * 7 + left + c]
            attended, _ = layer.attention(window)
            of_class.append(attended[:, 0])
            for r, c in inside:
                expected[:, 1 + (top + r) * 7 + left + c] += attended[:, 1 + 3 * r + c]
    expected[:, 0] += torch.stack(of_class).mean(dim=0)
    expected = expected + layer.mlp(layer.layernorm_after(expected))
    assert max_difference(mixed, expected) < 1e-5


def test_layer__in_windows_is_that_of_vitdet() -> None:
    # An image of 6 x 5 patches in windows of 4, filled up with zeros after the norm; block 2 of 3 attends globally.
    config = VitDetConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=40,
        patch_size=8,
        window_size=4,
        window_block_indices=[0, 2],
        use_absolute_position_embeddings=True,
        use_relative_position_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = scramble(VitDetModel(config)).eval()
    images = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    states = theirs(images, output_hidden_states=True).hidden_states  # (B, D, rows, columns) each

    ours_config = tiny_config(intermediate_size=64, layer_norm_eps=config.layer_norm_eps)
    tokens = states[0].flatten(2).transpose(1, 2)  # with their positions, and without a class token
    for index, block in enumerate(theirs.encoder.layer):
        layer = MAELayer(ours_config, 32, 2, 64).eval()
        weights = {name: value for name, value in block.state_dict().items() if "qkv" not in name}
        renamed = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attention.proj": "attention.o_proj"}
        for old, new in renamed.items():
            weights = {name.replace(f"{old}.", f"{new}."): value for name, value in weights.items()}
        for kind in ("weight", "bias"):
            qkv = block.state_dict()[f"attention.qkv.{kind}"].chunk(3)
            weights |= {f"attention.{one}_proj.{kind}": part for one, part in zip("qkv", qkv, strict=True)}
        layer.load_state_dict(weights)
        tokens, _ = layer(tokens, windows=Windows(4, (6, 5), 0) if index != 1 else None)
        expected = states[index + 1].flatten(2).transpose(1, 2)
        assert max_difference(tokens, expected) < 1e-5, f"block {index}"


def test_model__one_window_for_the_whole_image_is_the_plain_model() -> None:
    plain, windowed = tiny_config(), tiny_config(window_size=4, num_global_blocks=1)
    images = random_images(plain)
    assert seeded(MAEModel, windowed)(images).last_hidden_state.equal(seeded(MAEModel, plain)(images).last_hidden_state)
    noise = random_noise(plain)  # and what is hidden stays out of the encoder
    losses = [seeded(MAEForPreTraining, config)(images, noise=noise).loss for config in (plain, windowed)]
    assert losses[0].equal(losses[1])


def test_model__windows_see_their_own_patches_and_a_global_block_all() -> None:
    images = random_images(tiny_config(), batch=1)
    other = images.clone()
    other[..., 16:, 16:] += 1  # the window at the right and below
    kept = slice(1, 3)  # patches of the first window
    for global_blocks, is_seen in ((0, False), (1, True)):
        # Without blocks between, the class token is the only way from window to window: it is looked at once later.
        config = tiny_config(window_size=2, num_global_blocks=global_blocks, num_hidden_layers=1)
        model = scramble(seeded(MAEModel, config))
        before, after = model(images).last_hidden_state, model(other).last_hidden_state
        assert (not before[:, kept].equal(after[:, kept])) == is_seen
        assert not before[:, 0].equal(after[:, 0])


def test_windows__refuse_hidden_patches() -> None:
    config = tiny_config(window_size=2, num_global_blocks=1)
    with pytest.raises(ValueError, match=r"window_size 2 cuts the whole grid of 4x4 patches .* use window_size=0"):
        seeded(MAEForPreTraining, config)(random_images(config))


def test_windows__gradients_with_and_without_checkpointing() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model = seeded(MAEModel, tiny_config(window_size=3, num_global_blocks=1)).train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
        model(random_images(model.config)).last_hidden_state.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize(
    ("depth", "blocks"), [(12, {3, 6, 9, 12}), (24, {6, 12, 18, 24}), (32, {8, 16, 24, 32})], ids=["B", "L", "H"]
)
def test_global_blocks__are_those_of_vitdet(depth: int, blocks: set[int]) -> None:
    # Origin: the configurations of ViTDet, which count from 0: 2, 5, 8, 11 and so on.
    assert tiny_config(num_hidden_layers=depth, window_size=14).global_blocks == blocks


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"window_size": -1}, "window_size must be a number of patches"),
        ({"window_size": 2.5}, "window_size must be a number of patches"),
        ({"num_global_blocks": -1}, "num_global_blocks must be an int of at least 0"),
        ({"window_size": 2, "num_global_blocks": 4}, "num_global_blocks is 4, but there are 3 blocks"),
    ],
)
def test_windows__bad_values_are_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_config(**fields)
