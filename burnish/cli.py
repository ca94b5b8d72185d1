"""The command line. Thin: a stage is imported inside its command, so that `--help` needs no torch."""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from burnish.errors import UserError
from burnish.words import counted

if TYPE_CHECKING:
    from burnish.config import RunConfig
    from burnish.runs import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Finetune a language model on your own documents, on your own hardware. "
    "[bold]burnish run CONFIG.toml[/bold] does the whole path; each stage is a command too, and none is done twice for the same inputs.",
)
Config = Annotated[Path, typer.Argument(help="The run's TOML file.", metavar="CONFIG.toml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, put over the file.", metavar="[KEY=VALUE]...")]
Name = Annotated[str | None, typer.Option(help="Another name for the run: its folder under `root`.")]
Redo = Annotated[list[str] | None, typer.Option(help="Throw away this stage's folder first (data, plan, train, evaluate, export).")]
Anyway = Annotated[bool, typer.Option("--anyway", help="Run although the plan says that it does not fit (plan.anyway=true).")]
INTERRUPTED = 130


@app.command(rich_help_panel="The path")
def run(config: Config, overrides: Overrides = None, name: Name = None, redo: Redo = None, anyway: Anyway = False) -> None:
    """The whole path: data, plan, train, evaluate, export."""
    _run_all(*_open(config, overrides, name, redo, anyway))


@app.command(rich_help_panel="The path")
def data(
    config: Config,
    overrides: Overrides = None,
    name: Name = None,
    redo: Redo = None,
    show: Annotated[int, typer.Option(min=0, help="Print so many rows with what is trained and what is masked.")] = 0,
) -> None:
    """Documents and rows → instruction rows with their source page → tokens."""
    asked, folder = _open(config, overrides, name, redo)
    from burnish import pipeline
    from burnish.summary import print_data

    pipeline.prepare(asked, folder)
    print_data(folder, asked, show)


@app.command(rich_help_panel="The path")
def plan(
    config: Annotated[Path | None, typer.Argument(help="The run's TOML file, or none and --model.", metavar="[CONFIG.toml]")] = None,
    overrides: Overrides = None,
    name: Name = None,
    model: Annotated[str | None, typer.Option(help="llama-3-70b, a hub id, a folder, a .gguf file.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Other GPUs than this machine's: 2x4090, 8xa100-40, 2x24GB, none.")] = None,
    ram: Annotated[str | None, typer.Option(help="Other host memory than this machine's: 64GB.")] = None,
    context: Annotated[int | None, typer.Option(help="data.context")] = None,
    method: Annotated[str | None, typer.Option(help="adapt.method")] = None,
    format: Annotated[str | None, typer.Option(help="model.format")] = None,
    rank: Annotated[int | None, typer.Option(help="adapt.rank")] = None,
    batch: Annotated[int | None, typer.Option(help="train.rows_per_step: contexts in one optimizer step.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw one rank's memory by phase into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    anyway: Anyway = False,
) -> None:
    """Does it fit, how fast is it, and if not what would make it fit. Downloads no weights."""
    _quiet()
    from burnish import pipeline
    from burnish.plan.asked import asked_config
    from burnish.plan.machine import imagined_machine
    from burnish.runs import Run, open_run
    from burnish.summary import print_plan

    given = (*(overrides or ()), *((f"name={name}",) if name else ()), *(("plan.anyway=true",) if anyway else ()))
    flags = {"model": model, "context": context, "method": method, "format": format, "rank": rank, "batch": batch}
    asked = asked_config(config, given, flags)
    if picture is not None:
        from burnish.plan.picture import check_drawable

        check_drawable(picture)
    kept = config is not None and config.is_file() and gpus is None and ram is None  # of another machine, nothing is written
    folder = open_run(asked.root, asked.name) if kept else Run(Path(asked.root) / asked.name)
    prepared = pipeline.prepared_of(folder) if config is not None else None
    with _status() as progress:
        progress("planning: ways to run it are simulated, a second or two each")
        decided = pipeline.decided_for(asked, prepared, None if kept else imagined_machine(gpus, ram))
    print_plan(decided[1], as_json)
    if picture is not None:
        from burnish.plan.picture import draw

        draw(decided[1], picture, asked.model.path)
    if not decided[1].fits and not asked.plan.anyway:
        raise UserError("this run does not fit. Change what is said above; or try it as it is with --anyway: estimates are upper bounds.")
    if kept:
        pipeline.plan(asked, folder, decided)


@app.command(rich_help_panel="The path")
def train(config: Config, overrides: Overrides = None, name: Name = None, redo: Redo = None, anyway: Anyway = False) -> None:
    """Train, or continue an interrupted training. Does data and plan first where they are not done."""
    asked, folder = _open(config, overrides, name, redo, anyway)
    from burnish import pipeline

    _finished(pipeline.trained(asked, folder), folder)


@app.command(rich_help_panel="The path")
def evaluate(
    config: Config,
    overrides: Overrides = None,
    name: Name = None,
    redo: Redo = None,
    prompts: Annotated[Path | None, typer.Option(help="Answer the prompts of this file instead (.txt, or .jsonl with `prompt`).")] = None,
) -> None:
    """The base against the tuned model on what was held out, with 95 % intervals."""
    asked, folder = _open(config, overrides, name, redo)
    from burnish import pipeline
    from burnish.summary import print_answers, print_evaluation

    if prompts is not None:
        with _status() as progress:
            pipeline.ask(asked, folder, prompts, progress)
        print_answers(folder, prompts)
        return
    with _status() as progress:
        pipeline.evaluate(asked, folder, progress)
    print_evaluation(folder)


@app.command(rich_help_panel="The path")
def export(config: Config, overrides: Overrides = None, name: Name = None, redo: Redo = None) -> None:
    """Write what others read: a PEFT adapter, a merged folder."""
    asked, folder = _open(config, overrides, name, redo)
    from burnish import pipeline
    from burnish.summary import print_export

    pipeline.export(asked, folder)
    print_export(folder)


@app.command(rich_help_panel="The model")
def chat(
    folder: Annotated[Path, typer.Argument(help="A run's folder.", metavar="RUN")],
    new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
) -> None:
    """Talk to the tuned model of a run, in the terminal."""
    _quiet()
    from burnish import pipeline
    from burnish.runs import find_run
    from burnish.serve import chat as talk

    built, template = pipeline.load(find_run(folder))
    talk(built, template, new_tokens)


@app.command(rich_help_panel="The model")
def expand(
    model: Annotated[str, typer.Argument(help="A model's folder, a .gguf file, or a hub id.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    new_blocks: Annotated[int, typer.Option(help="Decoder blocks to add, spread evenly.")],
) -> None:
    """Add decoder blocks that do nothing until they are trained (Llama Pro), and write the model for others to train."""
    _quiet()
    from burnish.export.expanded_folder import expand_folder

    with _status() as progress:
        progress(f"writing {out}")
        grown = expand_folder(model, out, new_blocks)
    print(f"{out}: {counted(len(grown.sources), 'block')}, of which these are new: {', '.join(map(str, grown.new))}")


@app.command(rich_help_panel="The machine")
def doctor(
    root: Annotated[Path, typer.Option(help="Where runs are written, as `root` in a config.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """What this machine has, what that means for a run, and what is wrong. Writes and removes 64 MB in the cache and under `root`.

    Exit code 0 where a run can be made, 1 where something prevents one (what is marked `stops`).
    """
    _quiet()
    from burnish.plan.doctor.rules import stops
    from burnish.summary import print_machine

    if stops(print_machine(root, as_json)):
        raise SystemExit(1)


FOREIGN = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(rich_help_panel="From fsdp_qlora", context_settings=FOREIGN, add_help_option=False)
def compat(context: typer.Context, run: Annotated[bool, typer.Option("--run", help="Run it too, as train.py does.")] = False) -> None:
    """The arguments of fsdp_qlora's train.py as a config, to keep in a file. `--help` lists them and what becomes of each."""
    _quiet()
    from burnish.compat.command import listing, translated

    if {"--help", "-h"} & set(context.args):
        print(listing(), end="")
        return
    text, asked = translated(context.args)
    if _speaks():
        print(text, end="", flush=True)
    if run:
        from burnish.runs import open_run, write_whole

        folder = open_run(asked.root, asked.name)
        kept = folder.folder / "run.toml"
        folder.folder.mkdir(parents=True, exist_ok=True)
        if _speaks() and not kept.exists():  # a run that stands there with other settings is refused, and so keeps its own
            write_whole(kept, text)
        _run_all(asked, folder)
        if _speaks():
            write_whole(kept, text)


@app.command("block-expansion", hidden=True, context_settings=FOREIGN, add_help_option=False)
def block_expansion(context: typer.Context) -> None:
    """What fsdp_qlora's scripts/block_expansion.py does."""
    _quiet()
    from burnish.compat.llama_pro import expansion
    from burnish.export.expanded_folder import expand_folder

    model, folder, blocks = expansion(context.args)
    expand_folder(model, folder, blocks)
    print(f"{folder}: {counted(blocks, 'new block')}. To train: train.py --train_type bnb_llama_pro --llama_pro_path {folder}")


@app.command("import", rich_help_panel="From fsdp_qlora")
def import_state(
    file: Annotated[Path, typer.Argument(help="A model_state_dict.safetensors.", metavar="FILE")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT")],
    model: Annotated[str, typer.Option(help="The base that it was trained on, as model.path takes it.")],
    alpha: Annotated[float, typer.Option(help="As --lora_alpha was; the file does not say. Not read for DoRA.")] = 16.0,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="How it was trained: model.format=hqq, model.bits=2, data.context=2048 …", metavar="[KEY=VALUE]..."),
    ] = None,
) -> None:
    """What fsdp_qlora saved, as an adapter in PEFT's format or a model with its trained blocks."""
    _quiet()
    from burnish.compat.import_state import CONTEXT, Trained
    from burnish.compat.import_state import import_state as imported
    from burnish.toml import parse_config

    raw = {"name": "import", "model": {"path": model}, "data": {"context": CONTEXT}}
    asked = parse_config(raw, "burnish import", tuple(overrides or ()))
    print(imported(file, Trained(asked.model, alpha, asked.data.context, asked.data.template), folder))


def _run_all(asked: "RunConfig", folder: "Run") -> None:
    from burnish import pipeline
    from burnish.summary import print_summary

    with _status() as progress:
        outcome = pipeline.run_all(asked, folder, progress)
    _finished(outcome, folder)
    if _speaks():
        print_summary(folder)


def _open(
    config: Path, overrides: list[str] | None, name: str | None, redo: list[str] | None, anyway: bool = False
) -> "tuple[RunConfig, Run]":
    _quiet()
    from burnish.errors import did_you_mean
    from burnish.runs import STAGES, open_run
    from burnish.toml import load_config

    given = (*(overrides or ()), *((f"name={name}",) if name is not None else ()), *(("plan.anyway=true",) if anyway else ()))
    asked = load_config(config, given)
    folder = open_run(asked.root, asked.name)
    for stage in redo or ():
        if stage not in STAGES:
            raise UserError(f"--redo {stage}: no such stage.{did_you_mean(stage, list(STAGES))}")
        if _speaks():
            shutil.rmtree(folder.stage(stage), ignore_errors=True)
    return asked, folder


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A line that says what is being done, where somebody looks; one now and then in a log file."""
    from rich.console import Console

    from burnish.words import now_and_then

    console = Console(stderr=True)
    if not console.is_terminal:
        yield now_and_then(lambda text: print(text, file=sys.stderr, flush=True))
        return
    status = console.status("")

    def show(text: str) -> None:
        status.start()
        status.update(text)

    try:
        yield show
    finally:
        status.stop()


def _finished(outcome: Any, folder: "Run") -> None:
    if outcome.interrupted:
        print(
            f"Stopped after step {outcome.steps_done} of {outcome.steps}, saved in {folder.folder}. The same command continues.",
            file=sys.stderr,
        )
        raise SystemExit(INTERRUPTED)


def _speaks() -> bool:
    """Of several processes under torchrun, one prints."""
    return int(os.environ.get("RANK", "0")) == 0


def _quiet() -> None:
    """Our messages, and of others' only errors: a library's advice is for whoever calls it, which is us."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("burnish").setLevel(logging.INFO if _speaks() else logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(words: list[str] | None = None) -> None:
    """The `burnish` command, or these words of one. A user's mistake ends with its message and exit code 2."""
    try:
        status = app(words, standalone_mode=False)  # typer makes Ctrl-C an exit status by itself
        if status == INTERRUPTED:
            raise KeyboardInterrupt
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Interrupted. Nothing that was saved is lost; the same command continues.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except typer.Exit as done:
        raise SystemExit(done.exit_code) from None
    except typer.Abort:
        raise SystemExit(INTERRUPTED) from None
    except Exception as problem:
        if type(problem).__module__.startswith(("click", "typer")) and hasattr(problem, "exit_code"):
            problem.show()  # pyright: ignore[reportAttributeAccessIssue]
            raise SystemExit(2) from None
        raise


if __name__ == "__main__":
    main()
