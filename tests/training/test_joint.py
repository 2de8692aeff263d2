"""An image and its map are cut out and turned together; against slow loops and torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from mae_hf.training.joint import Part, RandomPart, View, color_jitter


def blocks(height: int, width: int) -> tuple[Image.Image, Tensor]:
    """An image of blocks of four pixels, each of a grey of its own, and the map that has the same numbers."""
    rows, columns = np.mgrid[:height, :width] // 4
    numbers = (rows * (width // 4) + columns).astype(np.uint8)
    return Image.fromarray(numbers), torch.from_numpy(numbers.astype(np.int64))


def slow_map(classes: Tensor, part: Part, fill: int) -> Tensor:
    """Each pixel by the place of its centre in the original."""
    height, width = part.image_shape
    found = torch.full((height, width), fill)
    bottom, right, rows, columns = part.inside(*classes.shape)
    for row in range(rows):
        for column in range(columns):
            y = part.top + (row + 0.5) * (bottom - part.top) / rows
            x = part.left + (column + 0.5) * (right - part.left) / columns
            found[row, column] = classes[int(y), int(x)]
    inside = found[:rows, :columns].flip(1) if part.mirrored else found[:rows, :columns]
    found[:rows, :columns] = inside.flip(0) if part.upside_down else inside.clone()
    return found


@pytest.mark.parametrize("seed", range(12))
def test_random_part__of_the_map_is_that_of_the_image(seed: int) -> None:
    image, classes = blocks(32, 24)
    torch.manual_seed(seed)
    view = View((40, 28), whole=seed % 2 == 0, short_side=None if seed % 4 == 1 else 30 if seed % 2 else None)
    part = RandomPart(view, [0.5, 2.0], True, True).draw(32, 24)
    labels = part.of_map(classes, fill=255)
    assert labels.shape == (40, 28)
    assert labels.equal(slow_map(classes, part, 255))
    pixels = part.of_image(image, None, [1.0])
    assert pixels.shape == (1, 40, 28)
    # Away from the edges of the blocks, where the resized image has mixed greys, both say the same.
    same = (pixels[0].long() - labels).abs() <= 1
    assert same.float().mean() > 0.5
    assert (pixels[0] == 255)[labels == 255].all(), "what is filled up in one is in the other"


def test_part__beyond_the_image_is_filled_up_on_the_right_and_below() -> None:
    image, classes = blocks(16, 16)
    part = Part(0, 0, 32, 24, (32, 24))
    labels, pixels = part.of_map(classes, 99), part.of_image(image.convert("RGB"), None, [0.0, 0.5, 1.0])
    assert labels[:16, :16].equal(classes)
    assert (labels[16:] == 99).all()
    assert (labels[:, 16:] == 99).all()
    assert pixels[:, :16, :16].equal(v2.functional.pil_to_tensor(image.convert("RGB")))
    assert pixels[:, 20, 20].tolist() == [0, 128, 255]


def test_random_part__nothing_random_is_the_fixed_view() -> None:
    image, _ = blocks(32, 24)
    view = View((48, 36))
    part = RandomPart(view, [1.0, 1.0], False, False).draw(32, 24)
    assert part.of_image(image, None, [0.0]).equal(view.of_image(image))


def test_random_part__sees_every_pixel_and_every_scale() -> None:
    view, seen, heights = View((8, 8), whole=False), torch.zeros(32, 24), set()
    torch.manual_seed(0)
    for _ in range(5000):
        part = RandomPart(view, [0.5, 2.0], True, True).draw(32, 24)
        bottom, right, _, _ = part.inside(32, 24)
        seen[part.top : bottom, part.left : right] += 1
        heights.add(part.height)
    assert (seen > 0).all()
    assert (min(heights), max(heights)) == (4, 16)


def test_class_share__is_drawn_again_where_one_class_fills_the_part() -> None:
    classes = torch.zeros(64, 64, dtype=torch.int64)
    classes[40:, 40:] = 1
    shares = []
    for largest in (1.0, 0.75):
        torch.manual_seed(0)
        draws = RandomPart(View((16, 16), whole=False), [1.0, 1.0], False, False, largest)
        parts = [draws.draw(64, 64, classes, 255).of_map(classes, 255).float().mean().item() for _ in range(60)]
        shares.append(sum(0.25 < share < 0.75 for share in parts) / len(parts))
    assert shares[1] > 2 * shares[0]
    # An image of one class is not drawn for ever.
    RandomPart(View((16, 16)), [1.0, 1.0], False, False, 0.5).draw(64, 64, torch.zeros(64, 64, dtype=torch.int64))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_color_jitter__of_any_channels_and_only_of_colours(mode: str) -> None:
    image = Image.linear_gradient("L").resize((16, 16)).convert(mode)
    part = Part(0, 0, 16, 16, (16, 16))
    torch.manual_seed(1)
    changed = [part.of_image(image, color_jitter(1.0), [0.5] * 4) for _ in range(20)]
    plain = part.of_image(image, None, [0.5] * 4)
    assert any(not pixels[:3].equal(plain[:3]) for pixels in changed)
    assert any(pixels.equal(plain) for pixels in changed)  # in half of the images
    assert all(pixels[3:].equal(plain[3:]) for pixels in changed)
    assert color_jitter(0.0) is None
