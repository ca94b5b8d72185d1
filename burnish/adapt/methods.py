"""What can be trained: one row for each `adapt.method`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from burnish.adapt.expand import Growth, check_silenced, growth
from burnish.adapt.targets import ALL, ALL_LINEAR, matching
from burnish.config import AdaptConfig, ExportConfig
from burnish.errors import UserError


@dataclass(frozen=True)
class Modules:
    """What a network has, by full names: what a method chooses from."""

    weighted: list[str]
    """Modules with parameters of their own."""
    linears: list[str]
    """Linear layers of the decoder; all of them are among `weighted`."""
    new: tuple[str, ...]
    """New blocks (`model.layers.10`)."""


@dataclass(frozen=True)
class Method:
    """One way to train."""

    title: str
    magnitude: bool | None
    """Whether its adapters have a magnitude; None where it has no adapters."""
    whole: Callable[[Modules, AdaptConfig], list[str]]
    """The modules whose own parameters are trained, beside adapters or instead of them."""
    grows: bool = False
    """Whether it adds blocks to the base."""
    formats: tuple[str, ...] = ()
    """Formats that the base may be held in; empty for any."""

    @property
    def adapts(self) -> bool:
        return self.magnitude is not None

    def growth(self, config: PretrainedConfig, adapt: AdaptConfig) -> Growth | None:
        """Where the blocks of the trained model come from, if not one for one from the base."""
        return growth(config.num_hidden_layers, adapt.new_blocks) if self.grows else None


def _also(modules: Modules, adapt: AdaptConfig) -> list[str]:
    if not adapt.also:
        return []
    names = matching(modules.weighted, adapt.also, "adapt.also", "module")
    quantized = [name for name in names if name in modules.linears]
    if quantized:
        raise UserError(
            f"adapt.also names {quantized[0]}, a linear layer of the decoder: those are frozen (and may be quantized) and get adapters. "
            "Name it in adapt.targets, or train all weights with adapt.method=full."
        )
    return names


def _everything(modules: Modules, adapt: AdaptConfig) -> list[str]:
    if ALL in adapt.targets:
        return modules.weighted
    named = tuple(target for target in adapt.targets if target != ALL_LINEAR)
    linears = modules.linears if ALL_LINEAR in adapt.targets else []
    chosen = {*linears, *(matching(modules.weighted, named, what="module") if named or not linears else ())}
    return [name for name in modules.weighted if name in chosen]


def _new_blocks(modules: Modules, adapt: AdaptConfig) -> list[str]:
    check_silenced(modules.new, modules.linears)
    return [name for name in modules.weighted if name.startswith(tuple(f"{block}." for block in modules.new))]


METHODS = {
    "lora": Method("LoRA", False, _also),
    "dora": Method("DoRA", True, _also),
    "full": Method("full finetuning", None, _everything, formats=("none",)),
    "expand": Method("block expansion", None, _new_blocks, grows=True),
}


def conflicts(adapt: AdaptConfig, format_name: str, ends: str = "none") -> list[str]:
    """What does not go together, a line each with the way out. `format_name` and `ends` are `model.format` and `model.ends`."""
    method, named, problems = METHODS[adapt.method], f"adapt.method = {adapt.method!r}", []
    if method.formats and format_name not in method.formats:
        problems.append(
            f"{named} trains the weights themselves, and model.format = {format_name!r} holds them in codes that cannot be trained. "
            "Set model.format=none, or train beside the codes with adapt.method=dora."
        )
    if method.formats and ends not in method.formats:
        problems.append(f"{named} trains embeddings and head too, and model.ends = {ends!r} holds them in codes. Set model.ends=none.")
    if adapt.new_blocks and not method.grows:
        problems.append(
            f"adapt.new_blocks = {adapt.new_blocks} is for adapt.method=expand, and {named}. Leave it out, or change the method."
        )
    if adapt.also and not method.adapts:
        instead = "name it in adapt.targets" if adapt.method == "full" else "only its new blocks are trained"
        problems.append(f"adapt.also names what is trained beside adapters, and {named} has none: {instead}. Leave adapt.also out.")
    if method.grows and adapt.targets != AdaptConfig().targets:
        problems.append(f"adapt.targets has no meaning where {named}: its new blocks are trained whole. Leave it out.")
    return problems


def check(adapt: AdaptConfig, format_name: str, ends: str = "none") -> None:
    """Raises a `UserError` for settings that do not go together, with the ways out."""
    problems = conflicts(adapt, format_name, ends)
    if problems:
        raise UserError("\n  ".join(problems))


def check_ends(chosen: list[str], ends: Sequence[str], asked: str) -> None:
    """Refuses to train embeddings or a head that are held in codes: `ends` are their modules' names, `asked` is `model.ends`."""
    trained = [name for name in chosen if name in ends]
    if trained and asked != "none":
        raise UserError(
            f"adapt.also names {trained[0]}, and model.ends = {asked!r} holds embeddings and head in codes, which cannot be trained. "
            "Set model.ends=none, or leave it out of adapt.also."
        )


def writers(export: ExportConfig, adapt: AdaptConfig) -> tuple[str, ...]:
    """What `export.writers` says; left out, what others read of the method."""
    if export.writers is not None:
        return export.writers
    return ("peft",) if METHODS[adapt.method].adapts else ("transformers",)


def in_words(adapt: AdaptConfig) -> str:
    """The method and the settings that it reads, for a person: `DoRA, rank 16, alpha 32, on all`."""
    method = METHODS[adapt.method]
    if method.grows:
        return f"{method.title}, {adapt.new_blocks} new decoder blocks (Llama Pro, arXiv 2401.02415)"
    if not method.adapts:
        return f"{method.title} of {', '.join(adapt.targets)}"
    stabilized = " (rank-stabilized)" if adapt.rank_stabilized else ""
    also = f"; {', '.join(adapt.also)} trained in full" if adapt.also else ""
    return f"{method.title}, rank {adapt.rank}, alpha {adapt.alpha:g}{stabilized}, on {', '.join(adapt.targets)}{also}"
