"""Frozen teachers and tokenizers: what they give a student, and what a run with one keeps and refuses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import run_pretrain
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from scripts import interrupt, losses, when_step
from test_run_pretrain import photos, pretrain  # noqa: F401  # a fixture
from tiny import scramble, seeded, tiny_config
from torch import Tensor
from torch.nn import functional as F

from mae_hf import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from mae_hf.patches import normalize_patches, patchify
from mae_hf.training import frozen, probes
from mae_hf.training.augment import image_processor
from mae_hf.training.command_line import parse_recipe, read_recipe
from mae_hf.training.tasks import PretrainRecipe
from mae_hf.training.teachers import PatchTokenizer, Teacher, as_seen

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

WIDTH = 16
VIT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"image_size": 64, "num_channels": 3}
FAMILIES = {
    "vit": (transformers.ViTConfig, VIT),
    "deit": (transformers.DeiTConfig, VIT),
    "dinov2": (transformers.Dinov2Config, VIT),
    "registers": (transformers.Dinov2WithRegistersConfig, {**VIT, "num_register_tokens": 3}),
    "dinov3": (transformers.DINOv3ViTConfig, {**VIT, "num_register_tokens": 2}),
    "clip": (transformers.CLIPVisionConfig, VIT),
    "siglip": (transformers.SiglipVisionConfig, VIT),
    "beit": (transformers.BeitConfig, {**VIT, "use_relative_position_bias": True}),
    "swin": (
        transformers.SwinConfig,
        {**STAGES, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "convnext": (transformers.ConvNextConfig, {**STAGES, "hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 1, 1]}),
    "resnet": (
        transformers.ResNetConfig,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
}


def save(folder: Path, kind: str) -> str:
    """A small teacher with random weights and the processor of its images."""
    config_class, fields = FAMILIES[kind]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config_class(**fields))
    scramble(model).save_pretrained(folder)
    shape = (fields.get("image_size", 64),) * 2
    image_processor(shape, 1.0, [0.4, 0.5, 0.6], [0.2, 0.3, 0.2]).save_pretrained(folder)
    return str(folder)


def student(**fields) -> MAEConfig:
    return tiny_config(target="features", target_size=WIDTH, **fields)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("image_size", [32, [32, 64]], ids=["square", "wide"])
def test_teacher__of_any_family_gives_a_map_on_the_grid(kind: str, image_size, tmp_path: Path) -> None:
    teacher = Teacher(save(tmp_path, kind))
    config = student(image_size=image_size)
    teacher.lay_on(config)
    assert teacher.size == {"swin": 16}.get(kind, WIDTH)
    images = pixels(2, 3, *config.image_shape)
    features = teacher(images)
    assert features.shape == (2, config.num_patches, teacher.size)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert torch.allclose(features.mean(dim=-1), torch.zeros(()), atol=1e-4)
    assert torch.allclose(features.var(dim=-1, unbiased=False), torch.ones(()), atol=2e-2)
    assert torch.equal(features[1:], teacher(images[1:])) or torch.allclose(
        features[1:], teacher(images[1:]), atol=1e-5
    )
    # Where the image changes, the features of that place change the most.
    changed = images.clone()
    changed[:, :, :16, :16] = 255 - changed[:, :, :16, :16]
    difference = (teacher(changed) - features).abs().mean(dim=(0, 2)).view(config.grid_shape)
    assert difference[:2, :2].mean() > difference[2:, 2:].mean()


@pytest.mark.parametrize("kind", ["vit", "dinov2", "registers", "clip"])
def test_teacher__plain_vit_is_seen_at_a_token_for_each_patch(kind: str, tmp_path: Path) -> None:
    name = save(tmp_path, kind)
    teacher = Teacher(name)
    config = student(image_size=[24, 20], patch_size=4)  # 6 x 5 patches, which are 48 x 40 pixels of the teacher's
    teacher.lay_on(config)
    assert teacher.view == (48, 40)
    images = pixels(2, 3, 48, 40)
    model = transformers.AutoModel.from_pretrained(name).eval()
    model = getattr(model, "vision_model", model)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1), torch.tensor([0.2, 0.3, 0.2]).view(-1, 1, 1)
    more = {} if kind in ("dinov2", "registers") else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        states = model((images / 255 - mean) / std, **more).last_hidden_state[:, -30:]
    assert torch.allclose(teacher(images), F.layer_norm(states, (WIDTH,)), atol=1e-5)


def test_teacher__layers_side_by_side(tmp_path: Path) -> None:
    name = save(tmp_path, "vit")
    both, first, second = Teacher(name, layers=[1, 2]), Teacher(name, layers=[1]), Teacher(name, layers=[2])
    assert (both.size, first.size) == (2 * WIDTH, WIDTH)
    images = pixels(1, 3, 32, 32)
    for teacher in (both, first, second):
        teacher.lay_on(student())
    assert torch.equal(both(images), torch.cat([first(images), second(images)], dim=-1))
    with pytest.raises(ValueError, match=r"teacher_layers are \[7\], but .* has 3 hidden states, 0 to 2"):
        Teacher(name, layers=[7])


@pytest.mark.parametrize("kind", ["pretraining", "classifier", "vit_mae"])
def test_teacher__another_mae_sees_every_patch(kind: str, tmp_path: Path) -> None:
    """A teacher may be the user's own earlier run; transformers' AutoModel of a ViTMAE would hide most of an image."""
    config = tiny_config(pooling="cls")
    if kind == "vit_mae":
        own = {name: value for name, value in VIT.items() if name != "hidden_size"}
        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(hidden_size=32, **own))
    else:
        model = seeded(MAEForPreTraining if kind == "pretraining" else MAEForImageClassification, config)
    model.save_pretrained(tmp_path)
    image_processor((32, 32), 1.0, [0.4] * 3, [0.2] * 3).save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path))
    teacher.lay_on(student())
    images = pixels(2, 3, 32, 32)
    encoder = MAEModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = encoder((images / 255 - 0.4) / 0.2).last_hidden_state[:, 1:]
    assert torch.allclose(teacher(images), F.layer_norm(expected, (32,)), atol=1e-5)


def test_teacher__grey_and_transparent_students(tmp_path: Path) -> None:
    teacher = Teacher(save(tmp_path, "vit"))
    teacher.lay_on(student(num_channels=1))
    grey = pixels(2, 1, 32, 32)
    features = teacher(grey)
    teacher.lay_on(student())
    assert torch.equal(features, teacher(grey.expand(-1, 3, -1, -1)))
    teacher.lay_on(student(num_channels=4))
    assert torch.equal(features, teacher(torch.cat([grey.expand(-1, 3, -1, -1), grey], dim=1)))


def test_teacher__sees_a_larger_crop_than_the_student(tmp_path: Path) -> None:
    teacher = Teacher(save(tmp_path, "vit"))
    config = student(image_size=16, patch_size=2)  # 8 x 8 patches
    teacher.lay_on(config)
    assert teacher.view == (64, 64)
    crop = pixels(1, 3, 64, 64)
    assert as_seen(crop, (64, 64)) is crop
    assert as_seen(crop, config.image_shape).shape == (1, 3, 16, 16)
    assert teacher(crop).shape == (1, 64, WIDTH)


def test_teacher__is_frozen_and_stays_in_evaluation(tmp_path: Path) -> None:
    teacher = Teacher(save(tmp_path, "resnet")).train()
    teacher.lay_on(student())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teacher(pixels(2, 3, 64, 64))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def save_timm(folder: Path, name: str, model: torch.nn.Module, **arguments: Any) -> None:
    """A model of timm as transformers' TimmWrapper reads it."""
    config = {"architecture": name, "num_classes": 1000, "model_type": "timm_wrapper", "model_args": arguments}
    config["pretrained_cfg"] = model.pretrained_cfg
    (folder / "config.json").write_text(json.dumps(config, default=str))
    weights = {f"timm_model.{key}": value for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")


def test_teacher__of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="a teacher of timm needs timm")
    for name, layers, size in (("tf_efficientnet_lite0", [3], 112), ("vit_tiny_patch16_224", None, 192)):
        folder = tmp_path / name
        folder.mkdir()
        torch.manual_seed(0)
        save_timm(folder, name, timm.create_model(name))
        teacher = Teacher(str(folder), layers=layers)
        teacher.lay_on(student(image_size=[32, 48]))
        assert teacher.size == size
        assert teacher(pixels(1, 3, 32, 48)).shape == (1, 24, size)


def test_tokenizer__is_the_nearest_centre(tmp_path: Path) -> None:
    config = tiny_config(num_channels=1, target="tokens", target_size=7)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(7, config.patch_dim, generator=generator)
    save_file({"centres": centres}, tmp_path / "tokens.safetensors")
    tokenizer = PatchTokenizer(str(tmp_path / "tokens.safetensors"))
    tokenizer.lay_on(config)
    images = pixels(3, 1, 32, 32)
    patches = normalize_patches(patchify(images / 255, config.patch_shape))
    expected = torch.stack([torch.stack([(p - centres).square().sum(dim=1).argmin() for p in own]) for own in patches])
    assert torch.equal(tokenizer(images), expected)
    with pytest.raises(ValueError, match="knows patches of 64 numbers, and those of the model have 192"):
        tokenizer.lay_on(tiny_config())


@pytest.mark.parametrize("kind", ["absent", "text", "other tensors", "not finite"])
def test_tokenizer__that_is_none_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    if kind == "text":
        path.write_text("none")
    elif kind != "absent":
        value = torch.full((3, 4), float("nan") if kind == "not finite" else 1.0)
        save_file({"centres" if kind == "not finite" else "codes": value}, path)
    with pytest.raises(ValueError, match=r"tokens\.safetensors"):
        PatchTokenizer(str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "features"], "--target features and --teacher belong together"),
        (["--teacher", "a/b"], "--target features and --teacher belong together"),
        (["--target", "tokens"], "--target tokens and --tokenizer belong together"),
        (["--target", "hog", "--tokenizer", "a"], "--target tokens and --tokenizer belong together"),
        (["--teacher_revision", "abc"], "teacher_revision has no effect without"),
        (["--target", "hog", "--teacher_layers", "3"], "teacher_layers has no effect without"),
        (["--teacher_hash", "abc"], "teacher_hash has no effect without"),
        (["--target", "colours"], "target"),
    ],
)
def test_recipe__what_belongs_together(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, SystemExit), match=message):
        parse_recipe(PretrainRecipe, words)


def test_recipe__a_teacher_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="teacher: there is no such file or folder as runs/teachr"):
        read_recipe(PretrainRecipe, ["--target", "features", "--teacher", "runs/teachr"])


def write_tokenizer(path: Path) -> str:
    save_file({"centres": torch.randn(5, 48, generator=torch.Generator().manual_seed(0))}, path)
    return str(path)


def words_of(target: str, tmp_path: Path) -> list[str]:
    if target == "features":
        return ["--target", "features", "--teacher", save(tmp_path / "teacher", "resnet"), "--teacher_layers", "1", "2"]
    if target == "tokens":
        return ["--target", "tokens", "--tokenizer", write_tokenizer(tmp_path / "tokens.safetensors")]
    return ["--target", target]


@pytest.mark.parametrize("target", ["hog", "features", "tokens"])
def test_run__learns_resumes_bit_equal_and_says_what_it_is(
    target: str,
    photos: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*words_of(target, tmp_path), "--mask_strategy", "block", "--epochs", "20", "--save_every", "10"]
    records = pretrain(photos, tmp_path / "whole", *words)
    said = capsys.readouterr().out
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["loss_of_mean"] > 0
    model = MAEForPreTraining.from_pretrained(tmp_path / "whole")
    assert (model.config.target, model.config.mask_strategy) == (target, "block")
    assert not any("teacher" in name for name in model.state_dict())
    card = (tmp_path / "whole" / "README.md").read_text()
    assert not (tmp_path / "whole" / "reconstruction.png").exists()
    assert "reconstruction.png" not in card
    assert str(tmp_path) not in card
    if target == "features":
        assert "distill" in card
        assert model.config.distilled_from.startswith("teacher@")
        assert model.config.target_size == 24
        assert f"target    features of {model.config.distilled_from}, 24 numbers a patch" in said

    with monkeypatch.context() as patch:
        when_step(17, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain(photos, tmp_path / "cut", *words)
    assert losses(pretrain(photos, tmp_path / "cut", *words)) == losses(records)
    ended, cut = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(ended[name], cut[name]) for name in ended)


def test_run__another_teacher_is_refused(photos: str, tmp_path: Path) -> None:  # noqa: F811
    words = words_of("features", tmp_path)
    pretrain(photos, tmp_path / "run", *words)
    teacher = tmp_path / "teacher" / "model.safetensors"
    weights = load_file(teacher)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, teacher, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"teacher_hash: '[0-9a-f]{16}' there, '[0-9a-f]{16}' now"):
        pretrain(photos, tmp_path / "run", *words)


@pytest.mark.parametrize("size", ["another", "the same"])
def test_run__continues_a_pixel_checkpoint_with_another_target(
    size: str,
    photos: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The last layer of the decoder is new, where it has the same shape as well; everything else goes on."""
    pretrain(photos, tmp_path / "pixels")
    start = ["--model_name_or_path", str(tmp_path / "pixels")]
    words = ["--target", "hog"]
    if size == "the same":  # 48 numbers in a patch of pixels, and in this vocabulary
        save_file({"centres": torch.randn(48, 48)}, tmp_path / "tokens.safetensors")
        words = ["--target", "tokens", "--tokenizer", str(tmp_path / "tokens.safetensors")]
    recipe = read_recipe(PretrainRecipe, ["--dataset", photos, *start, *words, "--output_dir", str(tmp_path / "next")])
    before, after = (
        MAEForPreTraining.from_pretrained(tmp_path / "pixels"),
        run_pretrain.build_model(recipe, run_pretrain.open_teacher(recipe)),
    )
    for name, weight in after.state_dict().items():
        assert ("decoder_pred" in name) != torch.equal(weight, before.state_dict().get(name, torch.zeros(0))), name
    capsys.readouterr()
    records = pretrain(photos, tmp_path / "next", *start, *words, "--epochs", "20")
    assert f"which has no decoder of {recipe.target}: that is new" in capsys.readouterr().out
    assert records[-1]["loss"] < records[0]["loss"]


def test_run__keeps_whom_a_checkpoint_was_taught_by(photos: str, tmp_path: Path) -> None:  # noqa: F811
    pretrain(photos, tmp_path / "taught", *words_of("features", tmp_path))
    teacher = MAEForPreTraining.from_pretrained(tmp_path / "taught").config.distilled_from
    pretrain(photos, tmp_path / "pixels", "--model_name_or_path", str(tmp_path / "taught"))
    assert MAEForPreTraining.from_pretrained(tmp_path / "pixels").config.distilled_from == teacher
    card = (tmp_path / "pixels" / "README.md").read_text()
    assert "This is a distillation" in card
    assert "has seen no labels" not in card
    name = write_tokenizer(tmp_path / "tokens.safetensors")
    words = ["--model_name_or_path", str(tmp_path / "pixels"), "--target", "tokens", "--tokenizer", name]
    pretrain(photos, tmp_path / "tokens", *words)
    now = MAEForPreTraining.from_pretrained(tmp_path / "tokens").config.distilled_from
    assert now == f"{PatchTokenizer(name).description}; before {teacher}"
    card = (tmp_path / "tokens" / "README.md").read_text()
    assert f"features of a frozen teacher, `{teacher}`" in " ".join(card.split())
    assert "The tokens are those of `tokenizer tokens.safetensors@" in card


def test_card__a_tokenizer_of_patches_has_seen_no_labels(photos: str, tmp_path: Path) -> None:  # noqa: F811
    pretrain(photos, tmp_path / "tokens", *words_of("tokens", tmp_path))
    card = (tmp_path / "tokens" / "README.md").read_text()
    assert "has seen no labels" in card
    assert "distillation" not in card
    pretrain(photos, tmp_path / "pixels", "--model_name_or_path", str(tmp_path / "tokens"))
    card = (tmp_path / "pixels" / "README.md").read_text()
    assert "has seen no labels" in card
    assert "distillation" not in card


@pytest.mark.parametrize("what", ["teacher", "tokenizer"])
def test_recipe__in_the_run_folder_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    words = {"teacher": ["--target", "features"], "tokenizer": ["--target", "tokens"]}[what]
    with pytest.raises(ValueError, match=f"holds the {what}, .*which the run would replace"):
        parse_recipe(PretrainRecipe, [*words, f"--{what}", str(tmp_path / "it"), "--output_dir", str(tmp_path)])


def test_hash__of_others_is_refused_by_name(tmp_path: Path) -> None:
    name = save(tmp_path / "teacher", "vit")
    with pytest.raises(ValueError, match=f"^{name} has the weights .*, and not 0000, which teacher_hash asks for"):
        Teacher(name, expected="0000")
    assert Teacher(name, expected=Teacher(name).hash).size == WIDTH
    tokens = write_tokenizer(tmp_path / "tokens.safetensors")
    with pytest.raises(ValueError, match=f"^{tokens} has the weights"):
        PatchTokenizer(tokens, "0000")


@pytest.mark.parametrize("kind", ["of transformers", "of ours"])
def test_teacher__a_classifier_is_the_same_one_at_every_start(kind: str, tmp_path: Path) -> None:
    """It has no pooler, which AutoModel draws anew, or no final norm: nothing of its patches."""
    torch.manual_seed(0)
    if kind == "of ours":
        seeded(MAEForImageClassification, student()).save_pretrained(tmp_path)
    else:
        config = transformers.ViTConfig(**VIT, num_labels=3)
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        teacher = Teacher(str(tmp_path))
        hashes.add(teacher.hash)
    assert len(hashes) == 1
    Teacher(str(tmp_path), expected=teacher.hash)


@pytest.mark.parametrize("kind", ["vit", "clip", "resnet"])
def test_teacher__that_lacks_weights_is_refused(kind: str, tmp_path: Path) -> None:
    name = save(tmp_path, kind)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in weights if key.endswith("weight") and "1" in key and "layernorm" not in key)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a teacher: its weights lack \S+, which would be random"):
        Teacher(name)


def test_teacher__with_weights_of_another_shape_is_refused(tmp_path: Path) -> None:
    name = save(tmp_path, "vit")
    weights = load_file(tmp_path / "model.safetensors")
    cut = next(key for key in weights if "layer" in key and key.endswith("weight"))
    save_file({**weights, cut: weights[cut][:-1].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not a teacher: its weights lack \S+, which would be random"):
        Teacher(name)


def test_teacher__may_lack_what_stands_for_hidden_patches(tmp_path: Path) -> None:
    name = save(tmp_path, "dinov2")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["embeddings.mask_token"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert Teacher(name).hash == Teacher(name).hash


def test_teacher__of_timm_with_channels_last(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="a teacher of timm needs timm")
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=8, num_heads=(2, 2))
    save_timm(tmp_path, "swin_tiny_patch4_window7_224", model, depths=[1, 1], embed_dim=8, num_heads=[2, 2])
    teacher = Teacher(str(tmp_path))
    teacher.lay_on(student(image_size=[32, 64]))
    assert teacher.size == 16
    assert teacher(pixels(1, 3, 32, 64)).shape == (1, 32, 16)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "view"), [([112, 224], 16, (112, 224)), (224, [8, 16], (392, 392)), (32, 8, (32, 32))]
)
def test_view__has_the_aspect_of_the_student(image_size, patch_size, view: tuple[int, int], tmp_path: Path) -> None:
    """By which crops are drawn: a square model sees crops that are not stretched, whoever teaches it."""
    name = save(tmp_path, "vit")
    teacher = Teacher(name)
    if patch_size == [8, 16]:  # 28 x 14 patches, which DINOv2's of 14 pixels see at 392 x 196
        teacher.patch_shape = (14, 14)
    teacher.lay_on(student(image_size=image_size, patch_size=patch_size))
    assert teacher.view == view


def test_run__computes_the_target_once_where_the_pixels_are_always_the_same(
    photos: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same masks as otherwise, so the same run but for the rounding of other batches of the teacher."""
    words = [*words_of("features", tmp_path), "--crop_scale", "1", "1", "--horizontal_flip", "false", "--epochs", "6"]
    kept = pretrain(photos, tmp_path / "kept", *words)
    assert "target    of 10 images computed once" in capsys.readouterr().out
    monkeypatch.setattr(run_pretrain, "shows_images_alike", lambda recipe: False)
    again = pretrain(photos, tmp_path / "again", *words)
    assert "computed once" not in capsys.readouterr().out
    for one, other in zip(kept, again, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_run__computes_the_target_in_each_step_where_memory_is_short(
    photos: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*words_of("features", tmp_path), "--crop_scale", "1", "1", "--horizontal_flip", "false"]
    with monkeypatch.context() as patch:
        patch.setattr(probes.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        pretrain(photos, tmp_path / "short", *words)
    assert "target    computed in each step. The features of 10 images take" in capsys.readouterr().out

    def fails(*arguments: Any) -> None:
        raise ValueError("another fault")

    monkeypatch.setattr(frozen, "check_features_fit", fails)
    with pytest.raises(ValueError, match="another fault"):  # which no step would mend
        pretrain(photos, tmp_path / "fault", *words)


def test_run__of_a_stream_computes_the_target_in_each_step(
    photos: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*words_of("features", tmp_path), "--crop_scale", "1", "1", "--horizontal_flip", "false"]
    records = pretrain(photos, tmp_path / "run", *words, "--streaming", "true", "--images_per_epoch", "10")
    assert "computed once" not in capsys.readouterr().out
    assert records[-1]["loss_of_mean"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "hog"], ["target    hog, by mse"]),
        (["--mask_strategy", "unit", "--mask_unit", "2"], ["masks     unit of 2x2, 75% of the patches"]),
        (["--mask_strategy", "block", "--mask_ratio", "0.4"], ["masks     block, 40% of the patches"]),
        ([], []),
    ],
)
def test_run__says_what_is_not_the_papers(
    words: list[str],
    said: list[str],
    photos: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretrain(photos, tmp_path / "run", *words)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("masks ", "target "))]
    assert lines == said


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        ([], None),
        (["--target_loss", "l1"], "target_loss"),
        (["--mask_unit", "3"], "mask_unit"),
        (["--target", "hog"], "target"),
    ],
)
def test_run__of_before_a_setting_existed_goes_on_as_it_was(
    words: list[str],
    difference: str | None,
    photos: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    whole = losses(pretrain(photos, tmp_path / "run"))
    file = tmp_path / "run" / "recipe.yaml"
    later = ("target", "target_loss", "teacher", "tokenizer", "mask_strategy", "mask_unit", "num_class_tokens")
    recipe = {name: value for name, value in yaml.safe_load(file.read_text()).items() if not name.startswith(later)}
    file.write_text(yaml.safe_dump(recipe))
    if difference is None:
        assert losses(pretrain(photos, tmp_path / "run")) == whole
    else:
        with pytest.raises(ValueError, match=rf"another recipe \({difference}: None there"):
            pretrain(photos, tmp_path / "run", *words)
