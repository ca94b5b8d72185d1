"""A model of ours is transformers' model: same folder, same logits, same losses, whatever the family."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from burnish.errors import UserError
from burnish.model import network
from tests.layers import OTHER_KINDS
from tests.tiny import FAMILIES, SIZES, a_plan, built_from, tiny_folder, train_a_little

FAMILY = pytest.mark.parametrize("family", FAMILIES)
LENGTHS = (9, 1, 30, 14)
# fp32: two layers, and attention sums in another order. Logits are of size 10
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A family's folder, made when it is first asked for."""
    made = {}

    def folder(family: str, **changes):
        key = (family, *sorted(changes.items()))
        if key not in made:
            made[key] = tiny_folder(tmp_path_factory.mktemp(family), family, **changes)
        return made[key]

    return folder


def theirs(folder, dtype=torch.float32, attention="eager"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def ids_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))


def packed_batch(lengths=LENGTHS, trained=lambda at, length: at >= 1):
    """Samples end to end as `burnish.data.batches.Batch` has them; every token after a sample's first is trained unless said otherwise."""
    ids = [ids_of(length, seed)[0] for seed, length in enumerate(lengths)]
    starts = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
    positions = [(start + at) for start, length in zip(starts, lengths, strict=False) for at in range(length) if trained(at, length) and at]
    whole = torch.cat(ids)
    return SimpleNamespace(
        ids=whole[None],
        positions=torch.cat([torch.arange(length) for length in lengths])[None],
        segments=tuple(starts),
        source=torch.tensor(positions) - 1,
        targets=whole[positions],
    )


def separate_losses(model, lengths=LENGTHS) -> Tensor:
    """transformers' loss of each token after the first, sample by sample."""
    losses = []
    for seed, length in enumerate(lengths):
        ids = ids_of(length, seed)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"))
    return torch.cat(losses)


@FAMILY
def test_unquantized_logits_equal_transformers(family, folders):
    built, ids = built_from(folders(family), {"format": "none"}), ids_of(40)
    with torch.no_grad():
        torch.testing.assert_close(built.model(ids).logits, theirs(folders(family))(ids).logits, **CLOSE)


@FAMILY
def test_nf4_logits_equal_transformers_with_bitsandbytes_decoded_weights(family, folders):
    from bitsandbytes import functional

    model, built, ids = theirs(folders(family)), built_from(folders(family), {"format": "nf4"}), ids_of(40)
    for module in network.decoder_layers(model).modules():
        if isinstance(module, nn.Linear):
            packed, state = functional.quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4", compress_statistics=False)
            module.weight.data = functional.dequantize_4bit(packed, state)
    with torch.no_grad():
        torch.testing.assert_close(built.model(ids).logits, model(ids).logits, **CLOSE)
        assert not torch.allclose(built.model(ids).logits, theirs(folders(family))(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    ("family", "format_name"),
    [*((family, name) for family in FAMILIES for name in ("none", "nf4")), *(("qwen2", name) for name in OTHER_KINDS)],
)
def test_before_training_the_adapted_model_is_the_base_bit_for_bit(family, format_name, folders):
    for method in ("lora", "dora"):
        built, ids = built_from(folders(family), {"format": format_name}, {"method": method}), ids_of(40)
        with torch.no_grad():
            adapted = built.model(ids).logits
            built.adapters.switch.on = False
            assert torch.equal(built.model(ids).logits, adapted)


@FAMILY
def test_packed_samples_have_the_losses_of_separate_ones(family, folders):
    built, right = built_from(folders(family), {"format": "none"}), separate_losses(theirs(folders(family)))
    batch = packed_batch()
    with network.packed(built.model):
        losses, loss = built.model.losses_of(batch), built.model.loss_of(batch)
    torch.testing.assert_close(losses, right, **CLOSE)
    assert loss.item() == pytest.approx(right.sum().item(), rel=1e-5)


@FAMILY
def test_no_sample_sees_another(family, folders):
    """Another first sample changes no bit of the others' losses."""
    built, batch = built_from(folders(family), {"format": "nf4"}), packed_batch()
    ids = batch.ids.clone()
    ids[0, : LENGTHS[0]] = ids_of(LENGTHS[0], seed=99)[0]
    other = SimpleNamespace(**(vars(batch) | {"ids": ids}))
    with network.packed(built.model):
        losses, changed = built.model.losses_of(batch), built.model.losses_of(other)
    own = LENGTHS[0] - 1
    assert torch.equal(losses[own:], changed[own:])
    assert not torch.equal(losses[:own], changed[:own])


@FAMILY
def test_gradients_of_a_packed_batch_are_the_sum_of_those_of_its_samples(family, folders):
    built = built_from(folders(family), plan=a_plan(dtype="fp64"))
    train_a_little(built)
    trained = built.adapters.trainable()

    def gradients(*batches):
        with network.packed(built.model):
            return torch.autograd.grad(sum(built.model.loss_of(batch) for batch in batches), list(trained.values()))

    whole = packed_batch()
    bounds = list(zip(whole.segments, whole.segments[1:], strict=False))
    parts = []
    for start, stop in bounds:
        inside = (whole.source >= start) & (whole.source < stop)
        parts.append(
            SimpleNamespace(
                ids=whole.ids[:, start:stop],
                positions=whole.positions[:, start:stop],
                segments=(0, stop - start),
                source=whole.source[inside] - start,
                targets=whole.targets[inside],
            )
        )
    for name, one, many in zip(trained, gradients(whole), gradients(*parts), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-10, msg=name)


@FAMILY
def test_checkpointing_changes_no_bit_of_loss_or_gradients(family, folders):
    found = []
    for checkpointing in (False, True):
        built = built_from(folders(family), {"format": "nf4"}, {"dropout": 0.2}, a_plan(checkpointing=checkpointing))
        train_a_little(built)
        built.model.train()
        for _ in range(2):  # the pass that finds d, and one that has it
            torch.manual_seed(4)
            with network.packed(built.model):
                loss = built.model.loss_of(packed_batch())
                found.append([loss.detach(), *torch.autograd.grad(loss, list(built.adapters.trainable().values()))])
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


def test_checkpointing_recomputes_every_layer_and_finds_d_once(folders, monkeypatch):
    from burnish.adapt.adapter import Adapter

    found, passes = [], []
    refresh, forward = Adapter.refresh, Adapter.forward
    monkeypatch.setattr(Adapter, "refresh", lambda self: found.append(self) or refresh(self))
    monkeypatch.setattr(Adapter, "forward", lambda self, x: passes.append(self) or forward(self, x))
    built = built_from(folders("llama"), plan=a_plan(checkpointing=True))
    built.model.train()
    for _ in range(3):
        with network.packed(built.model):
            built.model.loss_of(packed_batch()).backward()
    assert len(found) == 14
    assert len(passes) == 14 * 2 * 3


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_is_transformers_own(family, folders):
    folder = folders(family, sliding_window=8)
    built = built_from(folder, {"format": "none"})
    with network.packed(built.model):
        losses = built.model.losses_of(packed_batch())
    torch.testing.assert_close(losses, separate_losses(theirs(folder)), **CLOSE)
    assert not torch.allclose(losses, separate_losses(theirs(folders(family))), **CLOSE), "a window that nothing meets"


@FAMILY
@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads_are_transformers_own(family, tied, folders):
    folder = folders(family, tie_word_embeddings=tied)
    built, ids = built_from(folder, {"format": "none"}), ids_of(12)
    with torch.no_grad():
        torch.testing.assert_close(built.model(ids).logits, theirs(folder)(ids).logits, **CLOSE)
    assert (built.model.lm_head.weight is built.model.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in built.places) == (not tied)


def test_biases_on_every_projection_are_transformers_own(folders):
    folder = folders("llama", attention_bias=True, mlp_bias=True)
    built, ids = built_from(folder, {"format": "none"}), ids_of(12)
    assert all(layer.bias is not None for layer in built.linears.values())
    with torch.no_grad():
        torch.testing.assert_close(built.model(ids).logits, theirs(folder)(ids).logits, **CLOSE)


MORE = {
    "qwen3": transformers.Qwen3Config,
    "phi3": transformers.Phi3Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "olmo2": transformers.Olmo2Config,
    "granite": transformers.GraniteConfig,
    "cohere": transformers.CohereConfig,
    "cohere2": transformers.Cohere2Config,
}


SCALED = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
}
"""Families that scale their logits after the head: a loss of ours that forgot it would still fall in training."""


@pytest.mark.parametrize("family", MORE)
def test_other_dense_families_need_nothing_of_ours(family, tmp_path):
    """Logits, packed losses and the buffers that are computed anew (Gemma 3 has several rotary tables and an embedding scale)."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(MORE[family](**(SIZES | SCALED.get(family, {})))).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    built, ids = built_from(tmp_path, {"format": "none"}), ids_of(12)
    with torch.no_grad():
        torch.testing.assert_close(built.model(ids).logits, theirs(tmp_path)(ids).logits, **CLOSE)
    with network.packed(built.model):
        torch.testing.assert_close(built.model.losses_of(packed_batch()), separate_losses(theirs(tmp_path)), **CLOSE)


@FAMILY
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_buffers_that_no_file_holds_equal_transformers(family, dtype, folders):
    built = built_from(folders(family), plan=a_plan(dtype=dtype))
    right = dict(theirs(folders(family), network.DTYPES[dtype]).named_buffers())
    ours = dict(built.model.named_buffers())
    assert ours.keys() == right.keys()
    assert any("inv_freq" in name for name in ours)
    for name, buffer in ours.items():
        torch.testing.assert_close(buffer, right[name], rtol=0, atol=0, msg=name)


def test_a_buffer_that_cannot_be_computed_again_is_refused_by_name(folders):
    built = built_from(folders("llama"))
    built.model.model.norm.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(UserError, match=r"model\.norm keeps table out of its files"):
        network.renew_buffers(built.model)
    built.model.model.norm.register_buffer("table", torch.zeros(3, dtype=torch.int64), persistent=False)
    with pytest.raises(UserError, match=r"model\.norm keeps table out of its files"):
        network.renew_buffers(built.model)


def test_a_buffer_that_files_hold_is_refused_by_name(folders):
    built = built_from(folders("llama"))
    built.model.model.norm.register_buffer("table", torch.zeros(3))
    with pytest.raises(UserError, match=r"model\.norm keeps table in its files as a buffer"):
        network.renew_buffers(built.model)


# --- what is refused


REFUSED = {
    "mixtral": (transformers.MixtralConfig(**SIZES, num_local_experts=4), r"\(mixtral\) is a mixture of experts \(num_local_experts = 4\)"),
    "qwen2_moe": (transformers.Qwen2MoeConfig(num_experts=8), r"\(qwen2_moe\) is a mixture of experts"),
    "deepseek_v3": (transformers.DeepseekV3Config(), r"\(deepseek_v3\) is a mixture of experts"),
    "llava": (transformers.LlavaConfig(), r"\(llava\) is a multimodal model"),
    "gemma3": (transformers.Gemma3Config(), r"\(gemma3\) is a multimodal model"),
    "qwen2_audio": (transformers.Qwen2AudioConfig(), r"\(qwen2_audio\) is a multimodal model"),
    "falcon_h1": (transformers.FalconH1Config(lm_head_multiplier=0.1), r"\(falcon_h1\) scales its logits \(lm_head_multiplier = 0.1\)"),
    "t5": (transformers.T5Config(), r"\(t5\) is an encoder-decoder model"),
    "bart": (transformers.BartConfig(), r"\(bart\) is an encoder-decoder model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_out_of_scope_are_refused_by_name(kind):
    config, message = REFUSED[kind]
    with pytest.raises(UserError, match=f"some/model {message}"):
        network.refuse_unsupported(config, "some/model")


@FAMILY
def test_dense_models_are_not_refused(family):
    network.refuse_unsupported(FAMILIES[family](**SIZES), "some/model")


def test_a_mixture_of_experts_stops_before_any_weight_is_read(tmp_path):
    transformers.MixtralConfig(**SIZES, num_local_experts=4).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not even one")
    with pytest.raises(UserError, match="mixture of experts"):
        built_from(tmp_path)


def test_a_decoder_whose_weights_lie_outside_linear_layers_is_refused(tmp_path):
    """GPT-2 keeps its matrices in a module of its own: without the check nothing of it would be quantized or adapted."""
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=320, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="only 0% of the decoder's weights are in linear layers"):
        built_from(tmp_path)


def test_the_share_of_the_decoder_in_linear_layers_must_reach_95_percent():
    layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(95, 1, bias=False), "other": nn.Embedding(5, 1)})])
    swapped = {"0.proj": layers[0]["proj"]}
    network.check_share(layers, swapped)
    layers[0]["other"] = nn.Embedding(6, 1)
    with pytest.raises(UserError, match="only 94%"):
        network.check_share(layers, swapped)


def test_the_attention_of_packed_rows_is_put_back_after_use_even_after_an_error(folders):
    built = built_from(folders("llama"))
    before = built.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), network.packed(built.model):
        _ = 1 / (built.model.config._attn_implementation == before)
    assert built.model.config._attn_implementation == before


def test_a_plan_of_another_dtype_builds_the_whole_model_in_it(folders):
    built = built_from(folders("llama"), {"format": "none"}, plan=dataclasses.replace(a_plan(), dtype="fp64"))
    ids = ids_of(20)
    with torch.no_grad():
        torch.testing.assert_close(built.model(ids).logits, theirs(folders("llama"), torch.float64)(ids).logits, rtol=1e-5, atol=1e-5)
