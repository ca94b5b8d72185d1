"""Prepared samples for a person to look at: what is trained, what is only read, and where it came from."""

from pathlib import Path
from typing import Any

from burnish.data.rows import Row, StoredRows
from burnish.data.tokens import open_tokens
from burnish.data.write import ROW_FILES
from burnish.words import counted


def show(folder: Path, tokenizer: Any, count: int, name: str = "train") -> None:
    """Prints the first `count` samples of a set. Trained tokens are bold and between ⟦ ⟧, so that they are seen without colour too."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    tokens = open_tokens(folder / "tokens" / name)
    with StoredRows(folder / ROW_FILES[name]) as rows:
        for sample in range(min(count, len(tokens))):
            ids, mask = (array.tolist() for array in tokens.sample(sample))
            console.rule(f"{name} {sample + 1} of {len(tokens)}: {counted(len(ids), 'token')}, {sum(mask)} trained")
            for number in tokens.rows_of(sample):
                console.print(Text(source(rows[number]), style="cyan"))
            text = Text()
            for piece, trained in spans(ids, mask, tokenizer):
                text.append(f"⟦{piece}⟧" if trained else piece, style="bold green" if trained else "dim")
            console.print(text)
    console.print(
        f"⟦ ⟧ is trained. {counted(len(rows), 'row')} in {counted(len(tokens), 'sample')}, {counted(int(tokens.lengths.sum()), 'token')}."
    )


def spans(ids: list[int], mask: list[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, trained) of each run of tokens that are alike in that."""
    runs: list[tuple[list[int], bool]] = []
    for token, trained in zip(ids, mask, strict=True):
        if not runs or runs[-1][1] != bool(trained):
            runs.append(([], bool(trained)))
        runs[-1][0].append(token)
    return [(tokenizer.decode(run, skip_special_tokens=False), trained) for run, trained in runs]


def source(row: Row) -> str:
    """`rows.jsonl:12, page 8, section 4.1 The vessels`."""
    parts = [row.place, f"page {row.page}" if row.page is not None else None, f"section {row.section}" if row.section is not None else None]
    return ", ".join(part for part in parts if part)
