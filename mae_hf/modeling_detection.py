"""The encoder as a detector: ViTDet's Mask R-CNN (arXiv 2203.16527, Section 4), of torchvision's parts.

B batch  C channels  H,W image  K classes  M most detections in an image  n objects or detections in one

torchvision is imported when a detector is built: this file comes with every checkpoint, and others need none of it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from .configuration_mae import PYRAMID_SCALES, MAEConfig
from .inputs import refuse_unknown
from .modeling_dense import LayerNorm2d, MAEDenseModel

MASK_SIDE = 28  # positions of a predicted mask, stretched over its box
IMPOSSIBLE = -1e4  # the score of a class that a detection is not of


@dataclass
class MAEObjectDetectionOutput(ModelOutput):
    """What `MAEForObjectDetection` returns, as DETR does: its image processors read it.

    loss: () float32, in training: the sum of `loss_dict`.
    loss_dict: the losses of the proposals and of the heads.
    logits: (B, M, K + 1) float32, in evaluation: the logarithm of a detection's score at its class, and at last that of
        being no object, which is 0 where there is no detection.
    pred_boxes: (B, M, 4) float32, in evaluation: centre, width and height as shares of the image's.
    pred_masks: (B, M, 28, 28) float32, in evaluation: how likely each place of the box is the object's.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None


def _torchvision() -> tuple[Any, Any]:
    """Its detection models and its operators."""
    try:
        from torchvision import ops
        from torchvision.models import detection
    except ImportError as error:
        raise ImportError("The detector is made of torchvision's parts: pip install torchvision.") from error
    return detection, ops


def _heads(config: MAEConfig, num_labels: int) -> tuple[nn.Module, nn.Module]:
    """ViTDet's proposals and heads: four convolutions with LayerNorm before each prediction."""
    detection, ops = _torchvision()
    channels, levels = config.pyramid_channels, list(PYRAMID_SCALES)
    norm = partial(LayerNorm2d, eps=config.layer_norm_eps)
    smallest = config.anchor_size or 2 * max(config.patch_shape)
    sizes = tuple((smallest * 2**level,) for level in range(len(levels) + 1))
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    rpn = detection.rpn.RegionProposalNetwork(
        anchors,
        detection.rpn.RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": 1000},
        nms_thresh=0.7,
    )
    masks: dict[str, nn.Module] = {}
    if config.instance_masks:
        masks = {
            "mask_roi_pool": ops.MultiScaleRoIAlign(levels, MASK_SIDE // 2, 2),
            "mask_head": detection.mask_rcnn.MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm),
            "mask_predictor": detection.mask_rcnn.MaskRCNNPredictor(channels, channels, num_labels + 1),
        }
    box_head = detection.faster_rcnn.FastRCNNConvFCHead
    roi_heads = detection.roi_heads.RoIHeads(
        ops.MultiScaleRoIAlign(levels, 7, 2),
        box_head((channels, 7, 7), [channels] * 4, [config.box_head_channels], norm_layer=norm),
        detection.faster_rcnn.FastRCNNPredictor(config.box_head_channels, num_labels + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=config.proposals_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=None,
        score_thresh=config.detection_threshold,
        nms_thresh=0.5,
        detections_per_img=config.detections_per_image,
        **masks,
    )
    # How each layer begins, for `_init_weights`, which sees a layer alone: from a normal distribution or He's.
    predictor: Any = roi_heads.box_predictor
    for part, std in ((rpn, 0.01), (roi_heads, None), (predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                layer.init_std = std  # type: ignore[assignment]
    return rpn, roi_heads


class MAEForObjectDetection(MAEDenseModel):
    """The encoder with the simple feature pyramid and Mask R-CNN on it; without `instance_masks` Faster R-CNN.

    The classes of `config.id2label` are those of objects; there is none for the background. Images may be of any size.
    """

    # So that the positions of each level, down to one coarser than the pyramid's, lie exactly where their anchors are.
    coarsest = 4

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config, list(PYRAMID_SCALES), "simple")
        self.num_labels: int = config.num_labels  # type: ignore[assignment]  # transformers sets 2 if nothing is said
        self.rpn, self.roi_heads = _heads(config, self.num_labels)
        self.post_init()
        self._freeze_position_tables()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[dict[str, Tensor]] | None = None,
        states: Tensor | None = None,
        **kwargs: Any,
    ) -> MAEObjectDetectionOutput:
        """Find objects; in training, say how far from the labels they are.

        Args:
            pixel_values: (B, C, H, W) normalised images of any size, filled up on the right and below to the largest.
            pixel_mask: (B, H, W), 1 where there is an image; all is, if not given.
            labels: in training, for each image class_labels (n,) int64, boxes (n, 4), centre, width and height as
                shares of the image's, and with `instance_masks` masks (n, H, W). An image may have no object.
            states: what the method `states` has made of these images already.

        Returns:
            in training the losses, in evaluation the detections; of `labels` nothing is learned in evaluation.

        Raises:
            TypeError: an argument is unknown.
            ValueError: the labels do not fit the images or the model.
        """
        refuse_unknown(self, kwargs)
        padded = self.filled_up(pixel_values)
        sizes = _sizes(pixel_values, pixel_mask)
        targets = self._targets(labels, sizes) if self.training else None
        maps, _ = self.maps_and_encoded(padded, states=states)
        levels = OrderedDict(maps)
        with_coarser = OrderedDict(levels)
        with_coarser["p6"] = F.max_pool2d(levels["p5"], 1, 2)
        images = _torchvision()[0].image_list.ImageList(padded, sizes)
        proposals, of_rpn = self.rpn(images, with_coarser, targets)
        found, of_heads = self.roi_heads(levels, proposals, sizes, targets)
        if self.training:
            losses = {name: loss.float() for name, loss in {**of_rpn, **of_heads}.items()}
            return MAEObjectDetectionOutput(loss=torch.stack(list(losses.values())).sum(), loss_dict=losses)
        return self._detections(found, sizes)

    def _targets(
        self, labels: Sequence[dict[str, Tensor]] | None, sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Labels as torchvision has them: corners in pixels, 0 for the background."""
        if labels is None or len(labels) != len(sizes):
            raise ValueError(
                f"To train a detector, give labels with a dict for each of the {len(sizes)} images: class_labels, boxes"
                f"{' and masks' if self.config.instance_masks else ''}."
            )
        targets = []
        for image, (label, (height, width)) in enumerate(zip(labels, sizes, strict=True)):
            classes, boxes = label["class_labels"], label["boxes"].float()
            scale = boxes.new_tensor([width, height, width, height])
            corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1) * scale
            if len(boxes) and not (boxes[:, 2:] > 0).all():
                number = int((boxes[:, 2:] > 0).all(dim=1).logical_not().nonzero()[0])
                raise ValueError(f"Box {number} of image {image} has no area, {boxes[number].tolist()}: leave it out.")
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_labels:
                raise ValueError(
                    f"The classes of image {image} are {classes.unique().tolist()}, but must be from 0 to "
                    f"{self.num_labels - 1}."
                )
            target = {"boxes": corners, "labels": classes.long() + 1}
            if self.config.instance_masks:
                if "masks" not in label:
                    raise ValueError(f"Image {image} has no masks to learn: give them, or set instance_masks=False.")
                target["masks"] = label["masks"].to(torch.uint8)
            targets.append(target)
        return targets

    def _detections(self, found: list[dict[str, Tensor]], sizes: list[tuple[int, int]]) -> MAEObjectDetectionOutput:
        most, device = self.config.detections_per_image, found[0]["boxes"].device
        # In float32: 16 bits would have boxes to some pixels, and scores to two digits.
        logits = torch.full((len(found), most, self.num_labels + 1), IMPOSSIBLE, device=device)
        logits[..., -1] = 0
        boxes = torch.zeros(len(found), most, 4, device=device)
        with_masks = self.config.instance_masks
        masks = torch.zeros(len(found), most, MASK_SIDE, MASK_SIDE, device=device) if with_masks else None
        for image, (of_image, (height, width)) in enumerate(zip(found, sizes, strict=True)):
            count = len(of_image["scores"])
            scores = of_image["scores"].float().clamp(1e-6, 1 - 1e-6)
            logits[image, torch.arange(count), of_image["labels"] - 1] = scores.log()
            logits[image, :count, -1] = (1 - scores).log()
            corners = of_image["boxes"].float() / torch.tensor([width, height, width, height], device=device)
            boxes[image, :count, :2] = (corners[:, :2] + corners[:, 2:]) / 2
            boxes[image, :count, 2:] = corners[:, 2:] - corners[:, :2]
            if masks is not None:
                masks[image, :count] = of_image["masks"][:, 0].float()
        return MAEObjectDetectionOutput(logits=logits, pred_boxes=boxes, pred_masks=masks)

    def instances(
        self, output: MAEObjectDetectionOutput, target_sizes: Sequence[tuple[int, int]], threshold: float = 0.5
    ) -> list[dict[str, Tensor]]:
        """The detections in each image, the surest first.

        Args:
            output: in evaluation.
            target_sizes: (height, width) of each image, in the pixels that are wanted.
            threshold: of the scores.

        Returns:
            scores (n,), labels (n,) int64 from 0, boxes (n, 4), the corners in pixels, and with `instance_masks` masks
            (n, height, width) bool.
        """
        assert output.logits is not None
        assert output.pred_boxes is not None
        results = []
        for image, (height, width) in enumerate(target_sizes):
            scores, classes = output.logits[image, :, :-1].max(dim=-1)
            scores = scores.exp()
            order = scores.argsort(descending=True, stable=True)
            order = order[scores[order] >= max(threshold, 1e-6)]
            centre, side = output.pred_boxes[image, order].split(2, dim=1)
            boxes = torch.cat([centre - side / 2, centre + side / 2], dim=1)
            boxes = boxes * boxes.new_tensor([width, height, width, height])
            result = {"scores": scores[order], "labels": classes[order], "boxes": boxes}
            if output.pred_masks is not None:
                paste = _torchvision()[0].roi_heads.paste_masks_in_image
                pasted = paste(output.pred_masks[image, order].unsqueeze(1), boxes, (height, width))
                result["masks"] = pasted[:, 0] > 0.5
            results.append(result)
        return results

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not hasattr(module, "init_std"):
            super()._init_weights(module)
            return
        layer: Any = module
        if layer.init_std is not None:
            init.normal_(layer.weight, std=layer.init_std)
        elif isinstance(layer, nn.Linear):
            init.kaiming_uniform_(layer.weight, a=1)
        else:
            init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if layer.bias is not None:
            init.zeros_(layer.bias)


def _sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> list[tuple[int, int]]:
    """Height and width of each image without what fills it up."""
    height, width = pixel_values.shape[-2:]
    if pixel_mask is None:
        return [(height, width)] * len(pixel_values)
    if pixel_mask.shape != (len(pixel_values), height, width):
        raise ValueError(
            f"The pixel_mask is {tuple(pixel_mask.shape)}, but must be (batch, height, width) of the images, "
            f"{(len(pixel_values), height, width)}."
        )
    rows, columns = pixel_mask.bool().any(dim=2).sum(dim=1), pixel_mask.bool().any(dim=1).sum(dim=1)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


MAEForObjectDetection.register_for_auto_class("AutoModelForObjectDetection")
