"""How many rows of each source an epoch has, and which: whole numbers that follow from sizes, weights and the seed, and from nothing else.

The mixture is a list of samples, some of them more than once, and the token store is written anew in that order. Packing, batches and
resuming know nothing of it.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from burnish.config import DataConfig, MixtureSource
from burnish.data.draws import shuffled
from burnish.data.tokens import open_tokens, write_tokens
from burnish.errors import UserError
from burnish.runs import whole_folder
from burnish.words import counted

REPLAY = "replay"
"""What the rows of data.replay, of whichever file, are counted as."""


def mix(folder: Path, names: Sequence[str], config: DataConfig) -> dict[str, int]:
    """Writes the token store in `folder` anew, with the samples of one epoch, and returns its counts. `names` are the samples' sources.

    A file is read and written once, in order; nothing is held but the list of samples.
    """
    order = mixed(names, config.mixture, config.replay_share, config.seed)
    tokens = open_tokens(folder)
    samples = ((*(array.tolist() for array in tokens.sample(at)), tokens.rows_of(at)) for at in order)
    with whole_folder(folder) as temporary:
        return write_tokens(temporary, samples)


def by_source(folder: Path, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """What each source gives to an epoch: its distinct rows, its samples and their tokens. `names` are the rows' sources."""
    tokens = open_tokens(folder)
    found: dict[str, dict[str, Any]] = {}
    for at, length in enumerate(tokens.lengths.tolist()):
        rows = tokens.rows_of(at)
        own = found.setdefault(names[rows[0]], {"rows": set(), "samples": 0, "tokens": 0})
        own["rows"].update(rows)
        own["samples"] += 1
        own["tokens"] += length
    return {name: own | {"rows": len(own["rows"])} for name, own in sorted(found.items())}


def mixed(names: Sequence[str], mixture: tuple[MixtureSource, ...], replay_share: float, seed: int) -> list[int]:
    """The numbers of one epoch's rows, in order, from the source's name of each row.

    Without a mixture every row comes once. Replay's rows are as many as make `replay_share` of all. A row that comes more often than
    another of its source comes once more; which do is drawn by the seed. Raises a `UserError` where a source has no rows.
    """
    sizes = Counter(names)
    own = {name: count for name, count in sizes.items() if name != REPLAY}
    taken = counts(own, mixture) if mixture else own
    if replay_share:
        taken[REPLAY] = replay_count(sum(taken.values()), replay_share)
    places: dict[str, list[int]] = {name: [] for name in sizes}
    for at, name in enumerate(names):
        places[name].append(at)
    times = np.zeros(len(names), np.int64)
    for number, (name, count) in enumerate(sorted(taken.items())):
        if count and not places.get(name):
            raise UserError(f"{name}: there is no row of it left to train on, but an epoch should have {count}.")
        whole, more = divmod(count, len(places[name])) if count else (0, 0)
        times[places.get(name, [])] = whole
        for at in shuffled(len(places.get(name, [])), seed, "mixture", number)[:more]:
            times[places[name][at]] += 1
    return np.repeat(np.arange(len(names)), times).tolist()


def counts(sizes: dict[str, int], mixture: tuple[MixtureSource, ...]) -> dict[str, int]:
    """Rows of each source in one epoch: of n rows in all, exactly round(weight / sum of weights · n).

    n is the largest number for which no source is passed over more than its `epochs` times. Without weights each source has
    round(epochs · its rows). Weights are taken as the decimals that they were written as. Raises a `UserError` for weights that cannot
    be kept.
    """
    available = {part.source: _decimal(part.epochs) * sizes.get(part.source, 0) for part in mixture}
    check_weights(mixture)
    for part in mixture:
        if not sizes.get(part.source) and part.weight != 0:
            raise UserError(f"data.mixture: {part.source} has no row to train on. Remove it, or give it rows that fit the context.")
    if mixture[0].weight is None:
        return {name: round(rows) for name, rows in available.items()}
    weights = {part.source: _decimal(part.weight or 0) for part in mixture}
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    rows = min(available[name] / share for name, share in shares.items() if share)
    taken = {name: round(share * int(rows)) for name, share in shares.items()}
    for name, share in shares.items():
        if share and not taken[name]:
            raise UserError(
                f"data.mixture: of {counted(int(rows), 'row')} in an epoch, {name}'s weight gives it none. Raise its weight, or remove it."
            )
    return taken


def check_turns(config: DataConfig) -> None:
    """Raises a `UserError` where rows should be put together that are counted one by one."""
    if config.turns > 1 and (config.mixture or config.replay):
        which = "data.mixture" if config.mixture else "data.replay"
        raise UserError(
            f"{which} counts rows one by one, but data.turns = {config.turns} puts several into a conversation. Set data.turns=1."
        )


def check_weights(mixture: tuple[MixtureSource, ...]) -> None:
    """Raises a `UserError` for a mixture that no rows could make right."""
    given = [part for part in mixture if part.weight is not None]
    if given and len(given) < len(mixture):
        without = ", ".join(part.source for part in mixture if part.weight is None)
        raise UserError(f"data.mixture: some sources have a weight and {without} has none. Give each one, or leave all out.")
    if given and not any(part.weight for part in given):
        raise UserError("data.mixture: the weights sum to 0, so that no row would be trained. Give a source a weight above 0.")
    twice = [source for source, count in Counter(part.source for part in mixture).items() if count > 1]
    if twice:
        raise UserError(f"data.mixture names {twice[0]} twice. Give it once, with the sum of the weights or with more epochs.")


def replay_count(own_rows: int, share: float) -> int:
    """Rows of replay that make `share` of all rows of an epoch: round(share · own / (1 - share))."""
    part = _decimal(share)
    return round(part * own_rows / (1 - part))


def _decimal(value: float) -> Fraction:
    """The number as it was written: 0.1 is a tenth, not the nearest float to it."""
    return Fraction(repr(value))
