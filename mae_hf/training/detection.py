"""Detection: samples with boxes and masks, and COCO's average precision over all processes.

C channels  H,W image  h,w as the model sees it  n objects
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou
from transformers import DetrImageProcessor

from .augment import Normalize
from .decode import PIL_MODES
from .evaluate import say_left_out
from .joint import PartsOfImages, RandomPart, View
from .labels import Classes
from .objects import Objects, objects_of
from .order import PADDING, SampleKey
from .pictures import PicturedBoxes
from .samples import name_of
from .segmentation import MOST_PICTURED
from .sources import ImageSource

SHOWN_SCORE = 0.5  # of a detection that is drawn
SMALLEST_SIDE = 1.0  # pixels of what a crop leaves of a box
SIZES = ("small", "medium", "large")  # COCO's: below 32 x 32 pixels, below 96 x 96, and above
STATS = ("ap", "ap50", "ap75", *(f"ap_{size}" for size in SIZES))  # the first of COCO's twelve numbers


class ImagesWithObjects(PartsOfImages):
    """Images with objects, a random part of each: pixel_values (C, h, w) uint8, pixel_mask (h, w), and labels.

    The labels are those of DETR: class_labels (n,), boxes (n, 4), centre, width and height as shares, masks (n, h, w).

    Args:
        source: images with a column "objects".
        with_masks: whether masks are wanted.
        *looks, **more: see `PartsOfImages`.
    """

    def __init__(self, source: ImageSource, with_masks: bool, *looks: Any, **more: Any) -> None:
        super().__init__(source, *looks, **more)
        self.with_masks, self.classes = with_masks, source.classes or Classes([])

    def decode(self, row: dict[str, Any]) -> Any:
        """The image and its objects; an image is refused with them."""
        image = super().decode(row)
        return image, objects_of(row, image, self.classes, self.with_masks, name_of(row))

    def sample(self, key: SampleKey, row: dict[str, Any], image: Any) -> dict[str, Any]:
        picture, objects = image
        part = self.random_part.draw(picture.height, picture.width)
        _, _, rows, columns = part.inside(picture.height, picture.width)
        objects = objects.select(~objects.is_crowd)
        boxes, masks = part.of_boxes(objects.boxes, picture.height, picture.width), objects.masks
        if masks is not None:
            cut = [part.of_map(mask.to(torch.uint8), 0).bool() for mask in masks]
            masks = torch.stack(cut) if cut else torch.zeros(0, *part.image_shape, dtype=torch.bool)
            boxes = boxes_of(masks, boxes)  # a crop may leave a corner of the box, and nothing of the object
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST_SIDE).all(dim=1)
        boxes, scale = boxes[kept], boxes.new_tensor([columns, rows])
        centres = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2 / scale, (boxes[:, 2:] - boxes[:, :2]) / scale], dim=1)
        labels = {"class_labels": objects.labels[kept], "boxes": centres}
        if masks is not None:
            labels["masks"] = masks[kept]
        pixel_mask = torch.zeros(part.image_shape, dtype=torch.bool)
        pixel_mask[:rows, :columns] = True
        pixel_values = part.of_image(picture, self.jitter, self.fill)
        return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}


def boxes_of(masks: Tensor, boxes: Tensor) -> Tensor:
    """The boxes around masks (n, h, w), corners in pixels (n, 4); those of empty masks have no area."""
    found = torch.zeros_like(boxes)
    for number, mask in enumerate(masks):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(rows):
            corners = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            found[number] = torch.cat(corners).to(boxes)
    return found


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of which images may have any number of objects."""
    stackable: list[str] = [name for name in ("pixel_values", "pixel_mask", "states") if name in samples[0]]
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in stackable}
    lists = {name: [sample[name] for sample in samples] for name in ("labels", "problem")}
    return {**stacked, **lists}


class EvalImagesWithObjects(ImagesWithObjects):
    """The evaluation set: pixel_values as the view shows the image, objects in the pixels of its file, and the index.

    An image that cannot be used, and what only fills up a batch, has the index `PADDING`.
    """

    def __init__(self, source: ImageSource, view: View, num_channels: int, seed: int, with_masks: bool) -> None:
        random_part = RandomPart(view, [1, 1], False, False)
        super().__init__(source, with_masks, random_part, None, [], num_channels, seed)

    def substitute(self, key: SampleKey) -> tuple[dict[str, Any], Any]:
        return {"image": None}, (Image.new(PIL_MODES[self.num_channels], (8, 8)), None)

    def sample(self, key: SampleKey, row: dict[str, Any], image: Any) -> dict[str, Any]:
        picture, objects = image
        index = PADDING if key.epoch == PADDING or row["image"] is None else key.image_index
        size = (picture.height, picture.width)
        return {"pixel_values": self.transform(picture), "objects": objects, "size": size, "index": index}


def fitting_processor(view: View, image_mean: list[float], image_std: list[float]) -> DetrImageProcessor:
    """The view and normalisation as the image processor that is saved with the model."""
    height, width = view.image_shape
    return DetrImageProcessor(
        size={"max_height": height, "max_width": width},
        do_pad=True,
        pad_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        image_mean=image_mean,
        image_std=image_std,
        do_convert_rgb=None if len(image_mean) != 3 else True,
    )


def found_objects(
    model: Any, samples: Sequence[dict[str, Any]], view: View, normalize: Normalize
) -> list[dict[str, Tensor]]:
    """What a detector finds in images of `EvalImagesWithObjects`, in the pixels of their files; see its `instances`."""
    rows, columns = view.image_shape
    normalized = [normalize(sample["pixel_values"][None])[0] for sample in samples]
    batch = normalized[0].new_zeros(len(samples), normalized[0].shape[0], rows, columns)  # as the processor fills up
    mask = torch.zeros(len(samples), rows, columns, dtype=torch.bool, device=batch.device)
    for number, image in enumerate(normalized):
        batch[number, :, : image.shape[1], : image.shape[2]] = image
        mask[number, : image.shape[1], : image.shape[2]] = True
    output = model(batch, pixel_mask=mask)
    found = model.instances(output, [sample["size"] for sample in samples], threshold=0.0)
    return [{name: tensor.cpu() for name, tensor in of_image.items()} for of_image in found]


@dataclass(frozen=True)
class DetectionMetrics:
    """What is known of a detector after it has seen M images: COCO's average precision, over thresholds of the overlap.

    boxes, masks: by "ap" (mean over overlaps of 0.5 to 0.95), "ap50", "ap75", "ap_small", "ap_medium", "ap_large"; None
        where no object is of such a size; `masks` is None where there are none.
    per_class: AP of the boxes of each class, None for a class without objects.
    count, objects: M, and how many objects they have.
    fixed, worst: pictures, see `SegmentationMetrics`.
    """

    boxes: dict[str, float | None]
    masks: dict[str, float | None] | None
    per_class: list[float | None]
    count: int
    objects: int
    fixed: Sequence[PicturedBoxes] = ()
    worst: Sequence[PicturedBoxes] = ()

    def summary(self) -> dict[str, float]:
        """The numbers that are followed during a training."""
        of_masks = {f"mask_{name}": value for name, value in (self.masks or {}).items()}
        return {name: value for name, value in {**self.boxes, **of_masks}.items() if value is not None}

    def sentence(self) -> str:
        """The numbers for a person."""
        shown = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "small": "ap_small", "medium": "ap_medium"}
        shown["large"] = "ap_large"
        parts = [
            f"{title} {100 * value:.1f}" for title, name in shown.items() if (value := self.boxes[name]) is not None
        ]
        if self.masks is not None and self.masks["ap"] is not None:
            parts.append(f"masks {100 * self.masks['ap']:.1f}")
        return f"{'  '.join(parts)}  on {self.objects:,} objects in {self.count:,} images"


@torch.no_grad()
def evaluate_detector(
    find: Callable[[Sequence[dict[str, Any]]], list[dict[str, Tensor]]],
    batches: Iterable[list[dict[str, Any]]],
    names: Sequence[str],
    accelerator: Accelerator,
    max_skipped_images: float,
    with_masks: bool,
    fixed: Sequence[int] = (),
) -> DetectionMetrics:
    """The measures of all images of `evaluation_batches`, each counted once, over all processes.

    Args:
        find: see `found_objects`.
        batches: of samples of `EvalImagesWithObjects`, of this process.
        names: of the classes.
        accelerator: of the run.
        max_skipped_images: share of the images that may be left out, see `evaluate.say_left_out`.
        with_masks: whether masks are measured, too.
        fixed: indices of the images to be pictured.

    Raises:
        ValueError: more images have to be left out than may be, or there is no object at all.
    """
    problems: list[str] = []
    images: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    shown: list[PicturedBoxes] = []
    for samples in batches:
        problems += [sample["problem"] for sample in samples if sample["problem"]]
        for sample, of_image in zip(samples, find(samples), strict=True):
            if (index := sample["index"]) == PADDING:
                continue
            height, width = sample["size"]
            objects: Objects = sample["objects"]
            images.append({"id": index, "height": height, "width": width})
            truth += _records(index, objects.boxes, objects.labels, objects.masks, crowd=objects.is_crowd)
            found += _records(index, of_image["boxes"], of_image["labels"], of_image.get("masks"), of_image["scores"])
            score = found_share(of_image, objects)
            drawn = of_image["scores"] >= SHOWN_SCORE
            predicted = Objects(of_image["boxes"][drawn], of_image["labels"][drawn], drawn[drawn])
            shown.append(PicturedBoxes.of(sample, objects, predicted, score, index in fixed))
        others = sorted((one for one in shown if not one.is_fixed), key=lambda one: (one.score, one.index))
        shown = [*(one for one in shown if one.is_fixed), *others[:MOST_PICTURED]]
    say_left_out(gather_object(problems), sum(gather_object([len(images)])), max_skipped_images)
    images, truth, found, shown = (gather_object(items) for items in (images, truth, found, shown))
    if not truth:
        raise ValueError("There is no object in the evaluation set.")
    # What every process would find alike is found on one of them.
    measured = [_measured(images, truth, found, names, with_masks) if accelerator.is_main_process else None]
    boxes, masks, per_class = broadcast_object_list(measured)[0]
    shown.sort(key=lambda one: (one.score, one.index))
    fixed_ones = [one for one in shown if one.is_fixed]
    return DetectionMetrics(boxes, masks, per_class, len(images), len(truth), fixed_ones, shown[:MOST_PICTURED])


def refuse_unmeasured() -> None:
    """Say before a training, and not after it, that what measures detections is missing.

    Raises:
        ValueError: the package is not installed.
    """
    if find_spec("faster_coco_eval") is None:
        raise ValueError("Detections are measured by a package of its own: pip install faster-coco-eval.")


def found_share(found: dict[str, Tensor], objects: Objects) -> float:
    """How much of an image is right, from 0 to 1: twice the hits over detections and objects, at an overlap of a half.

    Detections count from a score of a half on; each hits one object of its class.
    """
    shown = found["scores"] >= SHOWN_SCORE
    boxes, labels = found["boxes"][shown], found["labels"][shown]
    wanted = objects.select(~objects.is_crowd)
    if not len(boxes) + len(wanted):
        return 1.0
    fits = (box_iou(boxes, wanted.boxes) >= 0.5) & (labels[:, None] == wanted.labels[None])
    free = torch.ones(len(wanted), dtype=torch.bool)
    for of_detection in fits:  # the surest first
        hit = (of_detection & free).nonzero()
        if len(hit):
            free[hit[0]] = False
    return 2 * int((~free).sum()) / (len(boxes) + len(wanted))


def _records(
    index: int,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    scores: Tensor | None = None,
    crowd: Tensor | None = None,
) -> list[dict[str, Any]]:
    """Objects or detections of an image as COCO writes them, small enough to be sent to another process."""
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    records = []
    for number, (box, label) in enumerate(zip(sides, labels.tolist(), strict=True)):
        record = {"image_id": index, "bbox": box, "category_id": label + 1, "area": box[2] * box[3]}
        if masks is not None:
            from faster_coco_eval.core import mask as of_coco

            record["segmentation"] = of_coco.encode(np.asfortranarray(masks[number].numpy().astype(np.uint8)))
            record["area"] = float(masks[number].sum())
        if scores is not None:
            record["score"] = float(scores[number])
        if crowd is not None:
            record["iscrowd"] = int(crowd[number])
        records.append(record)
    return records


def _measured(
    images: list[dict[str, Any]],
    truth: list[dict[str, Any]],
    found: list[dict[str, Any]],
    names: Sequence[str],
    with_masks: bool,
) -> tuple[dict[str, float | None], dict[str, float | None] | None, list[float | None]]:
    """COCO's numbers by its own rules."""
    from faster_coco_eval import COCO, COCOeval_faster

    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    numbered = [{**record, "id": number} for number, record in enumerate(truth, 1)]
    numbers: dict[str, dict[str, float | None]] = {}
    per_class: list[float | None] = []
    for kind in ("bbox", "segm") if with_masks else ("bbox",):
        of_truth = COCO({"images": images, "annotations": numbered, "categories": categories})
        of_found = of_truth.loadRes([dict(record) for record in found])
        coco = COCOeval_faster(of_truth, of_found, kind)
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
        stats = [None if value < 0 else float(value) for value in coco.stats[: len(STATS)]]
        numbers[kind] = dict(zip(STATS, stats, strict=True))
        if kind == "bbox":
            precision = coco.eval["precision"][:, :, :, 0, -1]  # (overlaps, recalls, classes) of all sizes
            known = [precision[:, :, number] for number in range(len(names))]
            per_class = [float(of_class.mean()) if (of_class > -1).all() else None for of_class in known]
    return numbers["bbox"], numbers.get("segm"), per_class
