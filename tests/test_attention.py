"""Whichever attention runs, it is the same attention; and what it keeps for the backward pass."""

import pytest
import torch
from tiny import max_difference, random_images, random_noise, scramble, seeded, tiny_config
from torch._dynamo.exc import BackendCompilerFailed
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mae_hf import MAEForImageClassification, MAEForPreTraining, MAEModel
from mae_hf.layers import sdpa_attention

CONFIG = tiny_config()
IMAGES, NOISE = random_images(CONFIG), random_noise(CONFIG)


@pytest.mark.parametrize("model_class", [MAEModel, MAEForPreTraining, MAEForImageClassification])
def test_sdpa__equals_eager(model_class: type) -> None:
    model = scramble(seeded(model_class, CONFIG))
    arguments = {"noise": NOISE} if model_class is MAEForPreTraining else {}
    outputs, gradients = [], []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        output = model(IMAGES, **arguments)
        outputs.append(output.logits if "logits" in output else output.last_hidden_state)
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert max_difference(*outputs) < 1e-5
    assert max_difference(*gradients) < 1e-5


@pytest.mark.parametrize("tokens", [50, 1100])
def test_sdpa__on_a_cpu_in_bfloat16_has_the_values_and_gradients_of_torchs_own(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    module = MAEModel(CONFIG).layers[0].attention
    inputs = [torch.randn(1, 2, tokens, 16, generator=generator).bfloat16() for _ in range(3)]
    results = []
    for attend, dtype in ((sdpa_attention, torch.bfloat16), (sdpa_attention_forward, torch.float32)):
        query, key, value = (tensor.detach().to(dtype).clone().requires_grad_() for tensor in inputs)
        mixed, weights = attend(module, query, key, value, None, scaling=0.25)
        assert weights is None
        mixed.square().sum().backward()
        results.append([mixed, query.grad, key.grad, value.grad])
    for fast, exact in zip(*results, strict=True):
        assert max_difference(fast, exact) < 0.02 * exact.abs().max()  # bfloat16 has three digits


def test_flex_attention__equals_eager() -> None:
    model = scramble(seeded(MAEModel, tiny_config(hidden_size=64)))  # flex wants heads of at least 16
    eager = model(IMAGES).last_hidden_state
    try:
        model.set_attn_implementation("flex_attention")
        with torch.no_grad():  # it has no backward on a CPU
            flex = model(IMAGES).last_hidden_state
    except (ImportError, NotImplementedError, BackendCompilerFailed) as error:  # no C++ compiler, or a CPU it can't use
        pytest.skip(f"flex_attention does not run here: {type(error).__name__}")
    assert max_difference(flex, eager) < 1e-5


@pytest.mark.parametrize("with_context", [False, True])
def test_autocast__the_three_projections_keep_one_copy_of_what_they_read(with_context: bool) -> None:
    attention = MAEModel(CONFIG).layers[0].attention
    width = CONFIG.hidden_size
    # Something computed, as in a model: of a leaf autocast itself makes one copy only.
    tokens, context = (1 * torch.randn(2, length, width, requires_grad=True) for length in (5, 7))
    kept: dict[int, torch.Size] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bfloat16:
            kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        mixed, _ = attention(tokens, context if with_context else None)
    assert mixed.dtype == torch.bfloat16
    shapes = list(kept.values())
    # Of the tokens, beside the copy that is projected, also what the last projection reads.
    assert (shapes.count((10, width)), shapes.count((14, width))) == (2, 1 if with_context else 0)


def test_autocast__leaves_a_model_in_float64_and_one_without_memory_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert MAEModel(CONFIG).double()(IMAGES.double()).last_hidden_state.dtype == torch.float64
        assert MAEModel(CONFIG).to("meta")(IMAGES.to("meta")).last_hidden_state.is_meta
