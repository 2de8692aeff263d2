"""Boxes go with their image; average precision against torchmetrics; what the processor shows."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou, masks_to_boxes

from mae_hf.training.augment import Normalize
from mae_hf.training.detection import (
    EvalImagesWithObjects,
    ImagesWithObjects,
    boxes_of,
    collate,
    evaluate_detector,
    fitting_processor,
    found_share,
)
from mae_hf.training.evaluate import evaluation_batches
from mae_hf.training.joint import Part, RandomPart, View
from mae_hf.training.objects import Objects
from mae_hf.training.order import SampleKey
from mae_hf.training.pictures import save_boxes
from mae_hf.training.scenes import digit_scenes
from mae_hf.training.sources import ImageSource, open_source

pytest.importorskip("faster_coco_eval", reason="pip install faster-coco-eval")


@pytest.fixture(scope="module")
def scenes() -> ImageSource:
    """Scenes of digits with their boxes."""
    from mae_hf.training.objects import open_objects
    from mae_hf.training.tasks import DetectionRecipe

    train, _ = open_objects(DetectionRecipe(dataset="digit_scenes", eval_split="validation"))
    return train


@pytest.mark.parametrize("seed", range(8))
def test_part__a_box_goes_where_its_object_goes(seed: int) -> None:
    torch.manual_seed(seed)
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[8:24, 20:44] = 1
    view = View((32, 48), keeps_aspect=True)
    part = RandomPart(view, [0.5, 2.0], True, True).draw(40, 60)
    (box,) = part.of_boxes(torch.tensor([[20.0, 8, 44, 24]]), 40, 60)
    cut = part.of_map(mask, 0)
    if cut.any():
        (expected,) = masks_to_boxes(cut[None])
        expected[2:] += 1
        assert (box - expected).abs().max() <= 1.5  # of a pixel that is halved
    else:
        assert min(box[2] - box[0], box[3] - box[1]) < 1.5


def test_part__boxes_outside_have_no_area_and_none_are_none() -> None:
    part = Part(0, 0, 20, 20, (40, 40), mirrored=True)
    found = part.of_boxes(torch.tensor([[30.0, 30, 50, 50], [10, 5, 30, 15]]), 60, 60)
    assert found[0, 0] == found[0, 2]
    assert found[1].tolist() == [0, 10, 20, 30]
    assert part.of_boxes(torch.zeros(0, 4), 60, 60).shape == (0, 4)


def test_boxes_of_masks__are_those_of_torchvision_plus_a_pixel() -> None:
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[0, 3:5, 7:8] = True
    masks[1, 19, 29] = True
    found = boxes_of(masks, torch.zeros(3, 4))
    expected = masks_to_boxes(masks[:2]) + torch.tensor([0, 0, 1, 1])
    assert found[:2].equal(expected)
    assert found[2].tolist() == [0, 0, 0, 0]


def test_training_sample__has_labels_of_detrs_form(scenes: ImageSource) -> None:
    view = View((48, 48), keeps_aspect=True)
    images = ImagesWithObjects(scenes, False, RandomPart(view, [0.6, 1.6], False, False), None, [0.3], 1, 0)
    keys = [SampleKey(1, index) for index in range(12)]
    samples = images.__getitems__(keys)
    batch = collate(samples)
    assert batch["pixel_values"].shape == (12, 1, 48, 48)
    assert len(batch["labels"]) == 12
    for sample, key in zip(samples, keys, strict=True):
        labels, again = sample["labels"], images[key]["labels"]
        assert labels["boxes"].equal(again["boxes"])
        assert labels["boxes"].shape == (len(labels["class_labels"]), 4)
        assert (labels["boxes"] >= 0).all()
        assert (labels["boxes"] <= 1 + 1e-6).all()
        # What is filled up is black here, too, and the ink lies in the boxes.
        rows, columns = sample["pixel_mask"].any(1).sum(), sample["pixel_mask"].any(0).sum()
        inside = torch.zeros(48, 48, dtype=torch.bool)
        for x, y, w, h in (labels["boxes"] * torch.tensor([columns, rows, columns, rows])).tolist():
            inside[max(0, int(y - h / 2) - 2) : int(y + h / 2) + 3, max(0, int(x - w / 2) - 2) : int(x + w / 2) + 3] = (
                True
            )
        ink = sample["pixel_values"][0] > 140
        assert not (ink & sample["pixel_mask"] & ~inside).any()
    assert len({len(sample["labels"]["boxes"]) for sample in samples}) > 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(50, 40), (37, 61), (64, 64), (20, 30)])
def test_processor__shows_what_the_evaluation_sees(mode: str, size: tuple[int, int]) -> None:
    channels, view = len(mode), View((64, 64), keeps_aspect=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).convert(mode)
    seen = Normalize([0.4] * channels, [0.3] * channels, torch.device("cpu"))(view.of_image(image))
    found = fitting_processor(view, [0.4] * channels, [0.3] * channels)(image, return_tensors="pt")
    rows, columns = seen.shape[1:]
    assert found.pixel_values.shape == (1, channels, 64, 64)
    assert (found.pixel_values[0, :, :rows, :columns] - seen).abs().max() < 1e-5
    assert found.pixel_mask[0, :rows, :columns].all()
    assert found.pixel_mask.sum() == rows * columns


def random_objects(seed: int, count: int, scores: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = 40 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([corners, corners + 5 + 50 * torch.rand(count, 2, generator=generator)], dim=1)
    labels = torch.randint(3, (count,), generator=generator)
    return {"boxes": boxes, "labels": labels, **({"scores": torch.rand(count, generator=generator)} if scores else {})}


class Fake(EvalImagesWithObjects):
    """Images without pixels worth a look, and objects of the test's."""

    def __init__(self, truth: list[dict[str, Tensor]]) -> None:
        self.truth, self.source = (
            truth,
            ImageSource("fakes", digit_scenes("validation").select(range(len(truth))), len(truth)),
        )

    def __getitems__(self, keys: list[SampleKey]) -> list[dict]:
        return [
            {
                "index": -1 if key.epoch == -1 else key.image_index,
                "objects": Objects(
                    of["boxes"], of["labels"], torch.zeros(len(of["labels"]), dtype=torch.bool), of.get("masks")
                ),
                "size": (100, 100),
                "pixel_values": torch.zeros(3, 20, 20, dtype=torch.uint8),
                "problem": "",
            }
            for key in keys
            for of in [self.truth[key.image_index]]
        ]


def filled(objects: dict[str, Tensor]) -> dict[str, Tensor]:
    masks = torch.zeros(len(objects["labels"]), 100, 100, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, objects["boxes"].int().tolist(), strict=True):
        mask[top:bottom, left:right] = True
    return {**objects, "masks": masks}


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("with_masks", [True, False])
def test_average_precision__is_that_of_torchmetrics(with_masks: bool, tmp_path) -> None:
    of_library = pytest.importorskip("torchmetrics", reason="pip install torchmetrics")
    truth = [random_objects(seed, count) for seed, count in enumerate([3, 0, 5, 2])]
    found = [random_objects(100 + seed, 6, scores=True) for seed in range(4)]
    for right, of_image in zip(truth, found, strict=True):  # some of them nearly right
        half = len(right["labels"]) // 2
        of_image["boxes"][:half] = right["boxes"][:half] + 1
        of_image["labels"][:half] = right["labels"][:half]
    if with_masks:
        truth, found = [filled(of) for of in truth], [filled(of) for of in found]

    def find(samples: list[dict]) -> list[dict[str, Tensor]]:
        return [found[max(sample["index"], 0)] for sample in samples]

    batches = evaluation_batches(Fake(truth), 3, 0, 1, 0, list)
    metrics = evaluate_detector(find, batches, ["a", "b", "c"], Accelerator(), 0.0, with_masks, fixed=[0, 2])
    kinds = ("bbox", "segm") if with_masks else ("bbox",)
    library = of_library.detection.MeanAveragePrecision(iou_type=kinds, class_metrics=True, backend="faster_coco_eval")
    library.update(found, truth)
    expected = library.compute()
    prefix = "bbox_" if with_masks else ""
    names = {"ap": "map", "ap50": "map_50", "ap75": "map_75", "ap_small": "map_small", "ap_medium": "map_medium"}
    for ours, theirs in names.items():
        value = expected[prefix + theirs].item()
        assert (metrics.boxes[ours] if metrics.boxes[ours] is not None else -1) == pytest.approx(value, abs=1e-6), ours
    assert metrics.boxes["ap_large"] is None
    per_class = expected[f"{prefix}map_per_class"].tolist()
    assert metrics.per_class == pytest.approx(per_class, abs=1e-6)
    if with_masks:
        assert metrics.masks["ap"] == pytest.approx(expected["segm_map"].item(), abs=1e-6)
    assert (metrics.count, metrics.objects) == (4, 10)
    assert sorted(one.index for one in metrics.fixed) == [0, 2]
    assert metrics.worst[0].score == min(one.score for one in metrics.worst)
    save_boxes(metrics.worst, ["a", "b", "c"], tmp_path / "boxes.png")
    Image.open(tmp_path / "boxes.png").load()


@pytest.mark.usefixtures("fresh_accelerate")
def test_evaluation__without_detections_is_zero_and_without_objects_refused() -> None:
    truth = [random_objects(0, 2), random_objects(1, 1)]
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}

    def evaluate(truth: list[dict]):
        batches = evaluation_batches(Fake(truth), 2, 0, 1, 0, list)
        return evaluate_detector(lambda s: [nothing] * len(s), batches, ["a", "b", "c"], Accelerator(), 0.0, False)

    assert evaluate(truth).boxes["ap"] == 0
    with pytest.raises(ValueError, match="no object in the evaluation set"):
        evaluate([random_objects(0, 0)])


def test_found_share__counts_each_object_once() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    objects = Objects(boxes, torch.tensor([0, 1]), torch.tensor([False, False]))
    found = {
        "boxes": boxes[[0, 0, 1]] + 0.5,
        "labels": torch.tensor([0, 0, 0]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
    }
    assert box_iou(found["boxes"], boxes).max() > 0.5
    assert found_share(found, objects) == pytest.approx(2 * 1 / (3 + 2))  # one hit, one again, one of another class
    assert (
        found_share(
            {name: tensor[:0] for name, tensor in found.items()}, objects.select(torch.tensor([], dtype=torch.int64))
        )
        == 1.0
    )


def test_scenes__boxes_are_those_of_their_masks() -> None:
    for row in digit_scenes("validation").select(range(20)):
        mask = torch.from_numpy(np.array(row["mask"]))
        for box, digit in zip(row["objects"]["bbox"], row["objects"]["category"], strict=True):
            x, y, w, h = (int(side) for side in box)
            part = mask[y : y + h, x : x + w]
            assert (part == digit + 1).any(0).all(), "no column of the box is empty"
            assert (part == digit + 1).any(1)[[0, -1]].all()
    assert open_source("digit_scenes", "validation").length == 100
