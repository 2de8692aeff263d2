"""The detector: what it finds, what it learns from, and that its checkpoints are whole."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import max_difference, scramble, seeded, tiny_config
from torch import Tensor
from torchvision.ops import box_iou
from transformers import DetrImageProcessor, pipeline

from mae_hf import MAEConfig, MAEForObjectDetection, MAEForPreTraining, MAEModel
from mae_hf.training.optim import layerwise_groups


def detector_config(**fields: object) -> MAEConfig:
    small = {"pyramid_channels": 16, "box_head_channels": 32, "detections_per_image": 20, "num_labels": 3}
    return tiny_config(**{**small, "detection_threshold": 0.0, **fields})


def images_of(height: int = 64, width: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def labels_of(height: int = 64, width: int = 64) -> list[dict[str, Tensor]]:
    """Two objects in the first image, none in the second."""
    boxes = torch.tensor([[0.25, 0.25, 0.3, 0.4], [0.7, 0.6, 0.4, 0.2]])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    for mask, (x, y, w, h) in zip(masks, boxes.tolist(), strict=True):
        mask[
            round((y - h / 2) * height) : round((y + h / 2) * height),
            round((x - w / 2) * width) : round((x + w / 2) * width),
        ] = True
    none = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4), "masks": masks[:0]}
    return [{"class_labels": torch.tensor([0, 2]), "boxes": boxes, "masks": masks}, none]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 75), (32, 100)])
def test_evaluation__detections_lie_in_the_image_and_are_read_by_detrs_processor(height: int, width: int) -> None:
    model = scramble(seeded(MAEForObjectDetection, detector_config()), std=0.02)
    with torch.no_grad():
        output = model(images_of(height, width))
    assert output.loss is None
    assert output.logits.shape == (2, 20, 4)
    assert output.pred_boxes.shape == (2, 20, 4)
    assert output.pred_masks.shape == (2, 20, 28, 28)
    shares = output.logits.softmax(-1)
    assert torch.allclose(shares.sum(-1), torch.ones(2, 20))
    sizes = [(120, 200), (90, 60)]
    found = DetrImageProcessor().post_process_object_detection(output, threshold=0.01, target_sizes=sizes)
    own = model.instances(output, sizes, threshold=0.01)
    for theirs, ours, (rows, columns) in zip(found, own, sizes, strict=True):
        assert len(theirs["scores"]) == len(ours["scores"]) > 0
        assert theirs["scores"].sort(descending=True).values.allclose(ours["scores"], atol=1e-5)
        assert set(theirs["labels"].tolist()) <= {0, 1, 2}
        assert theirs["boxes"].min() >= -1e-3
        assert (theirs["boxes"] <= torch.tensor([columns, rows, columns, rows]) + 1e-3).all()
        assert ours["masks"].shape == (len(ours["scores"]), rows, columns)


def test_pixel_mask__what_fills_up_is_no_part_of_the_image() -> None:
    model = scramble(seeded(MAEForObjectDetection, detector_config()), std=0.02)
    image = images_of(64, 64, 1)
    filled = torch.zeros(1, 3, 64, 128)
    filled[..., :64] = image
    mask = torch.zeros(1, 64, 128)
    mask[..., :64] = 1
    with torch.no_grad():
        found = model(filled, pixel_mask=mask)
    corners = model.instances(found, [(64, 64)], 0.0)[0]["boxes"]
    assert len(corners) > 0
    assert corners.max() <= 64.001
    with pytest.raises(ValueError, match=r"pixel_mask is \(1, 64, 64\), but must be"):
        model(filled, pixel_mask=mask[..., :64])


@pytest.mark.parametrize("instance_masks", [True, False])
def test_training__every_weight_has_a_gradient_and_no_object_is_no_nan(instance_masks: bool) -> None:
    model = seeded(MAEForObjectDetection, detector_config(instance_masks=instance_masks)).train()
    output = model(images_of(), labels=labels_of())
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert output.loss_dict.keys() == names | ({"loss_mask"} if instance_masks else set())
    assert output.loss.item() == pytest.approx(sum(loss.item() for loss in output.loss_dict.values()), rel=1e-5)
    output.loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    nothing = model(images_of(), labels=[labels_of()[1]] * 2).loss
    assert nothing.isfinite()
    nothing.backward()


def test_bfloat16__losses_and_detections_in_float32() -> None:
    model = seeded(MAEForObjectDetection, detector_config())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.train()(images_of(), labels=labels_of()).loss.dtype == torch.float32
        output = model.eval()(images_of())
    assert output.logits.dtype == output.pred_boxes.dtype == output.pred_masks.dtype == torch.float32


def test_labels__that_do_not_fit_are_refused() -> None:
    model = seeded(MAEForObjectDetection, detector_config()).train()
    flat, other, bare = labels_of(), labels_of(), labels_of()
    flat[0]["boxes"][1, 3] = 0
    with pytest.raises(ValueError, match="Box 1 of image 0 has no area"):
        model(images_of(), labels=flat)
    other[0]["class_labels"][0] = 3
    with pytest.raises(ValueError, match=r"classes of image 0 are \[2, 3\], but must be from 0 to 2"):
        model(images_of(), labels=other)
    del bare[0]["masks"]
    with pytest.raises(ValueError, match="Image 0 has no masks to learn: give them, or set instance_masks=False"):
        model(images_of(), labels=bare)
    with pytest.raises(ValueError, match="give labels with a dict for each of the 2 images"):
        model(images_of())


def test_learning__finds_two_objects_by_heart() -> None:
    torch.manual_seed(0)
    model = seeded(MAEForObjectDetection, detector_config(detection_threshold=0.05)).train()
    labels = labels_of()[:1]
    image = 0.1 * images_of(batch=1)
    for number, mask in enumerate(labels[0]["masks"]):
        image[0, number, mask] += 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(image, labels=labels).loss.backward()
        optimizer.step()
    with torch.no_grad():
        output = model.eval()(image)
    (found,) = model.instances(output, [(64, 64)], threshold=0.5)
    truth = torch.tensor([[6.4, 3.2, 25.6, 28.8], [32.0, 32.0, 57.6, 44.8]])
    overlap = box_iou(found["boxes"], truth)
    for number, label in ((0, 0), (1, 2)):
        of_class = overlap[:, number] * (found["labels"] == label)
        best = of_class.argmax()
        assert of_class[best] > 0.6
        mask = labels[0]["masks"][number]
        both = (found["masks"][best] & mask).sum() / (found["masks"][best] | mask).sum()
        assert both > 0.5


def test_from_pretrained__bit_equal_and_an_encoder_alone(tmp_path: Path) -> None:
    model = scramble(seeded(MAEForObjectDetection, detector_config()), std=0.02)
    model.save_pretrained(tmp_path)
    loaded, info = MAEForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        assert max_difference(loaded(images_of()).pred_boxes, model(images_of()).pred_boxes) < 1e-5
    _, info = MAEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]

    before = scramble(seeded(MAEForPreTraining, tiny_config()))
    before.save_pretrained(tmp_path / "mae")
    words = {"pyramid_channels": 16, "box_head_channels": 32, "num_labels": 3}
    heads = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        new, info = MAEForObjectDetection.from_pretrained(tmp_path / "mae", **words, output_loading_info=True)
        assert all(name.startswith(("pyramid.", "rpn.", "roi_heads.")) for name in info["missing_keys"])
        assert all(weight.equal(new.vit.state_dict()[name]) for name, weight in before.vit.state_dict().items())
        assert all(value.isfinite().all() for value in new.state_dict().values())
        predictor = new.roi_heads.box_predictor
        assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.3)
        assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.3)
        assert new.rpn.head.cls_logits.weight.std().item() == pytest.approx(0.01, rel=0.3)
        assert new.roi_heads.mask_head[0][0].weight.std().item() == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.3)
        heads.append(predictor.cls_score.weight)
    assert not heads[0].equal(heads[1])


def test_layer_decay__everything_above_the_encoder_is_one_layer() -> None:
    model = seeded(MAEForObjectDetection, detector_config())
    rates = {id(p): group["lr_scale"] for group in layerwise_groups(model, 0.1, 0.5) for p in group["params"]}
    assert {rates[id(p)] for name, p in model.named_parameters() if not name.startswith("vit.")} == {1.0}
    assert len(rates) == sum(1 for _ in model.parameters())


def test_pipeline__names_and_places_objects(tmp_path: Path) -> None:
    names = {0: "cat", 1: "dog", 2: "eel"}
    model = scramble(seeded(MAEForObjectDetection, detector_config(id2label=names, num_labels=3)), std=0.02)
    model.save_pretrained(tmp_path)
    DetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False).save_pretrained(tmp_path)
    detect = pipeline("object-detection", str(tmp_path), device="cpu")
    found = detect(Image.linear_gradient("L").resize((200, 120)).convert("RGB"), threshold=0.01)
    assert found
    for one in found:
        assert one["label"] in names.values()
        assert 0 < one["score"] < 1
        assert 0 <= one["box"]["xmin"] <= one["box"]["xmax"] <= 200
        assert 0 <= one["box"]["ymin"] <= one["box"]["ymax"] <= 120


def test_size__of_vit_base_is_that_of_the_papers() -> None:
    with torch.device("meta"):
        model = MAEForObjectDetection(MAEConfig(num_labels=80, image_size=1024))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    # Origin: ViTDet's Mask R-CNN of ViT-B has 111 M parameters; 5.56 M of them are the pyramid's.
    assert parts["pyramid"] == 5_560_000
    assert 109e6 < sum(parts.values()) < 116e6
