"""What a person sees at the end of a stage. Reads run folders; computes nothing that a stage has not written."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from burnish.config import RunConfig
from burnish.runs import Run, cache_root, read_json
from burnish.words import counted

EXAMPLES = 3
SHOWN = 20


def print_data(run: Run, config: RunConfig, show: int) -> None:
    """What the data stage read, what it left out and why; with `show`, rows with their mask."""
    folder = run.stage("data")
    report = read_json(folder / "report.json")
    console = Console()
    table = Table(
        "",
        "rows",
        "with page",
        "tokens",
        "trained tokens",
        "longest row",
        title=f"{folder}: {counted(report['documents'], 'document')}, {counted(report['pages'], 'page')}",
    )
    for name in ("train", "unseen_section", "unseen_wording", "validation", "general"):
        counts = report[name]
        table.add_row(name, *(f"{counts[column]:,}" for column in ("rows", "rows_with_page", "tokens", "supervised", "longest_row")))
    console.print(table)
    for read in report["files"]:
        console.print(
            f"{read['file']}: {counted(read['rows'], 'row')} in the format {read['format']} ({read['keys']})", highlight=False, markup=False
        )
    for name, counts in report["sources"].items() if len(report["sources"]) > 1 else ():
        of = f"{counted(counts['samples'], 'sample')} of {counted(counts['rows'], 'row')} in an epoch, {counted(counts['tokens'], 'token')}"
        console.print(f"{name}: {of}", highlight=False, markup=False)
    held_out = report.get("held_out_sections", [])
    for section in held_out[:SHOWN]:
        place = f"{Path(section['file']).name}, page {section['page']}"
        console.print(f"held out: {section['section']} ({place})", highlight=False, markup=False)
    if (more := len(held_out) - SHOWN) > 0:
        console.print(f"and {counted(more, 'more section')}; {folder / 'report.json'} names them", highlight=False, markup=False)
    for left in report["left_out"][:SHOWN]:
        console.print(f"left out: {left['row']}: {left['reason']}", highlight=False, markup=False)
    if (more := report["left_out_rows"] - SHOWN) > 0:
        console.print(
            f"and {more:,} more {'is' if more == 1 else 'are'} left out; {folder / 'report.json'} says why", highlight=False, markup=False
        )
    if show:
        from burnish.data.show import show as show_rows
        from burnish.load.pretrained import find_model, read_tokenizer

        show_rows(folder, read_tokenizer(find_model(config.model, weights=False)), show)


def print_evaluation(run: Run) -> None:
    """The tables of the last evaluation."""
    from burnish.evaluate.report import read, render

    Console().print(render(read(run.stage("evaluate"))))


def print_answers(run: Run, prompts: Path) -> None:
    """What base and tuned answered to the prompts of a file, side by side."""
    from burnish.evaluate.prompts import FOLDER, render

    path = run.folder / FOLDER / f"{prompts.name}.json"
    console = Console()
    console.print(render(read_json(path)))
    console.print(f"Kept in {path}.", highlight=False, markup=False, soft_wrap=True)


def print_export(run: Run) -> None:
    """Where the exports lie, and how far each is from the live model."""
    console = Console()
    for name, report in read_json(run.stage("export") / "report.json").items():
        distance = report.get("distance")
        if distance is None:
            console.print(f"{name}: {run.stage('export') / name}", highlight=False)
            continue
        from burnish.export.distance import in_words

        console.print(f"{name}: {run.stage('export') / name}; {in_words(distance)}", highlight=False)


def print_summary(run: Run) -> None:
    """The whole run: tables, some answers, time, speed, memory, where it lies."""
    console = Console()
    if run.stage("evaluate").exists():
        print_evaluation(run)
    for answer in examples(run.stage("evaluate")):
        console.print(f"[bold]{answer['question']}[/bold]  ({answer['truth']})")
        console.print(
            f"  base   {_line(answer['base']['answer'])}\n  tuned  {_line(answer['tuned']['answer'])}", highlight=False, markup=False
        )
    print_export(run)
    console.print(_costs(run), highlight=False)
    console.print(f"The run lies in {run.folder}. Talk to it: burnish chat {run.folder}", highlight=False)


def examples(folder: Path, count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Some answers of the evaluation, spread evenly over it, right and wrong alike."""
    if not (folder / "answers.jsonl").exists():
        return []
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    answers = [answer for answer in answers if answer["set"] == "unseen_wording"] or answers
    return [answers[number * len(answers) // count] for number in range(min(count, len(answers)))]


def _line(text: str, longest: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"


def _costs(run: Run) -> str:
    records = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    seconds, tokens = sum(record["seconds"] for record in records), sum(record["tokens"] for record in records)
    supervised = sum(record["supervised"] for record in records)
    return (
        f"Training: {counted(len(records), 'step')} in {seconds / 60:.1f} minutes, {counted(tokens, 'token')} ({supervised:,} trained), "
        f"{tokens / seconds:.0f} tokens/s, at most {max(record['memory_bytes'] for record in records) / 1e9:.2f} GB, "
        f"loss {records[0]['loss']:.3f} → {records[-1]['loss']:.3f}."
    )


def print_plan(report: Any, as_json: bool = False) -> None:
    """Does it fit, with how much to spare, and why each thing was decided."""
    if as_json:
        from burnish.plan.report import as_json as plain

        print(json.dumps(plain(report), indent=2))
        return
    from burnish.plan.render import render

    Console().print(render(report))


def print_machine(root: Path, as_json: bool) -> Any:
    """What this machine is, for a person or as JSON; returns what was found."""
    from burnish.plan.doctor.probes import probe
    from burnish.plan.doctor.rules import findings_of
    from burnish.plan.doctor.show import as_json as values
    from burnish.plan.doctor.show import render

    facts = probe({"runs": root, "cache": cache_root()})
    findings = findings_of(facts)
    if as_json:
        print(json.dumps(values(facts, findings), indent=1, ensure_ascii=False))
    else:
        Console().print(render(facts, findings))
    return findings
