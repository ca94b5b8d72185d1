"""The whole path in one screen: documents → rows → tokens → plan → train → evaluate → export.

Each stage takes the config and the run, does nothing where its folder already holds what these inputs give, and leaves a manifest.
`run_all` is the path; below it stand the stages in order, and at the end what they share.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from burnish.adapt.disk import about_adapter, load_adapter, read_adapter_header, save_adapter, tensors_file
from burnish.config import EvaluateConfig, Plan, RunConfig, canonical
from burnish.data.batches import Batches
from burnish.data.key import data_keys
from burnish.data.prepare import load_rows
from burnish.data.prepare import prepare as prepare_data
from burnish.data.rows import Row, StoredRows
from burnish.data.sources import template_name
from burnish.data.template import Template, choose_template
from burnish.data.tokens import open_tokens
from burnish.errors import UserError, writing
from burnish.evaluate.compare import adapters_off, sets_of, write
from burnish.evaluate.compare import evaluate as compare_models
from burnish.evaluate.general import general_key, general_set
from burnish.evaluate.prompts import FOLDER as PROMPTS
from burnish.evaluate.prompts import answer_prompts, read_prompts
from burnish.export.tuned import Tuned
from burnish.export.writers import export as export_model
from burnish.keys import check_data_unused, check_same_training, data_digest, plan_key
from burnish.load.pretrained import find_model, read_tokenizer, tokenizer_digest
from burnish.load.weights import open_weights
from burnish.model.network import context_of
from burnish.parallel.launch import RankDied, launch
from burnish.parallel.world import World, alone, barrier, launched_rank, launched_ranks, world
from burnish.plan.decide import Prepared, decide
from burnish.plan.failure import Attempt, answered, died
from burnish.plan.machine import Machine, this_machine, with_pins
from burnish.plan.report import Report, as_json, refuse_unless_fits
from burnish.plan.shapes import find_base
from burnish.runs import Run, check_kind, file_digest, is_done, read_json, read_manifest, whole_folder, write_json, write_manifest
from burnish.skeleton import Built, fill, refill, skeleton
from burnish.toml import parse_config
from burnish.train.run import Outcome, train
from burnish.train.start import check_start
from burnish.train.validate import validation_loss

log = logging.getLogger("burnish")


def run_all(config: RunConfig, run: Run, progress: Callable[[str], None] = log.info) -> Outcome:
    """Documents in, a checked model to serve out."""
    outcome = trained(config, run)
    if not outcome.interrupted and launched_rank() == 0:
        if something_held_out(run) or config.evaluate.general:
            evaluate(config, run, progress)
        else:
            log.warning("nothing is evaluated: no row was kept out of training (data.questions, data.held_out_sections)")
        progress("export")
        export(config, run)
    return outcome


def prepare(config: RunConfig, run: Run) -> None:
    """Documents and rows → `1-data`: rows with their source, tokens with a loss mask, held-out sets."""
    folder = run.stage("data")
    if config.train.validate_every and not config.data.validation:
        raise UserError(
            f"train.validate_every = {config.train.validate_every}, but data.validation gives no rows: files of them, or a share."
        )
    pretrained = find_model(config.model, weights=False)
    tokenizer = read_tokenizer(pretrained)
    keys = data_keys(config.data, tokenizer_digest(tokenizer))
    if any(_unchanged(folder, key) for key in keys):
        return
    check_data_unused(run, keys[0])
    with _answered("data", config, run), whole_folder(folder) as temporary:
        prepare_data(config.data, tokenizer, temporary, context_of(pretrained.config), tokenizer_digest(tokenizer))
        write_manifest(temporary, keys[0])


def plan(config: RunConfig, run: Run, known: tuple[Plan, Report] | None = None) -> Plan:
    """Config and machine → `2-plan`: what is done where, whether it fits, and if not what would. Costs no memory.

    `known` is what `decided_for` gave for them, where that was asked before.
    """
    folder = run.stage("plan")
    prepared = prepared_of(run)
    key = plan_key(config, planned_machine(config), prepared and asdict(prepared))
    if not _unchanged(folder, key):
        decided, report = known or decided_for(config, prepared)
        refuse_unless_fits(report, config.plan.anyway)
        with whole_folder(folder) as temporary:
            write_json(temporary / "plan.json", canonical(decided))
            write_json(temporary / "report.json", as_json(report))
            write_manifest(temporary, key)
    return plan_of(run)


def decided_for(config: RunConfig, prepared: Prepared | None = None, machine: Machine | None = None) -> tuple[Plan, Report]:
    """What the plan would be, with its reasons, and nothing written. `machine`: another than this one."""
    return decide(config, find_base(config.model), planned_machine(config, machine), prepared)


def prepared_of(run: Run) -> Prepared | None:
    """What a plan wants to know of `1-data`, where that is there."""
    report, tokens = run.stage("data") / "report.json", run.stage("data") / "tokens" / "train"
    return Prepared(read_json(report)["contexts"], int(open_tokens(tokens).lengths.max(initial=1))) if report.exists() else None


def planned_machine(config: RunConfig, machine: Machine | None = None) -> Machine:
    return with_pins(machine or this_machine(), config.plan)


def trained(config: RunConfig, run: Run) -> Outcome:
    """`prepare`, `plan`, then `finetune` on as many processes as the plan says: started here, or by torchrun before us."""
    if launched_ranks() > 1:
        config = replace(config, plan=replace(config.plan, ranks=launched_ranks()))
        with world(this_machine().device, launched_ranks()) as here:
            if here.is_main:
                prepare(config, run)
                plan(config, run)
            barrier()
            return finetune(config, plan_of(run), run, here)
    prepare(config, run)
    decided = plan(config, run)
    if decided.ranks > 1:
        check_same_training(config, run)  # before processes are started
        if (done := _trained_already(run)) is not None:
            return done
        try:
            return launch(_rank, (canonical(config), str(run.folder)), decided.ranks)[0]
        except RankDied as end:
            raise died(Attempt(config, run, alone(decided.device), decided_for), end) from None
    return _rank(canonical(config), str(run.folder))


def _rank(config: dict[str, Any], folder: str) -> Outcome:
    """One process of a training run."""
    run = Run(Path(folder))
    decided = plan_of(run)
    with world(decided.device, decided.ranks) as here:
        return finetune(parse_config(config), decided, run, here)


def finetune(config: RunConfig, plan: Plan, run: Run, here: World) -> Outcome:
    """What every rank does: `3-train` with checkpoints and the adapter. The first lines cost no memory: the model is still on meta."""
    folder = run.stage("train")
    key = check_same_training(config, run)
    if (done := _trained_already(run)) is not None:
        return done
    pretrained = find_model(config.model)
    weights = open_weights(pretrained)
    built = skeleton(pretrained.config, config.model, config.adapt, plan, here, weights.infos)
    batches = open_batches(config, plan, run, here)
    with _answered("load", config, run, here):
        fingerprint = fill(built, weights, config.model, config.adapt, here)
        check_start(built, batches, here)
    if here.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, key, done=False)
    with _answered("train step", config, run, here):
        outcome = train(built, batches, config.train, run, here, _names_of_rows(run), _watched(built, config, run, here))
    if not outcome.interrupted:
        template = choose_template(read_tokenizer(pretrained), template_name(config.data), config.data.system)
        about = about_adapter(
            config.model,
            plan,
            fingerprint,
            {"name": template.name, "jinja": template.jinja, "system": template.system},
            config.data.context,
        )
        save_adapter(built.adapters, config.adapt, folder / "adapter", about, [name for name, _ in built.model.named_modules()])
        if here.is_main:
            write_json(folder / "config.json", {"burnish": "config/1", "config": canonical(config)})
            write_manifest(folder, key, extra={"steps": outcome.steps, "fingerprint": fingerprint})
    return outcome


def evaluate(config: RunConfig, run: Run, progress: Callable[[str], None] = log.info) -> dict[str, Any]:
    """The base against the tuned model on what was held out → `4-evaluate`."""
    folder = run.stage("evaluate")
    sets = sets_of(run.stage("data"), needed=not config.evaluate.general)
    names, general_files = general_key(config.evaluate)
    key = {"evaluate": canonical(config.evaluate) | {"general": names}, "general": general_files}
    key |= {"train": training_digest(run), "data": data_digest(run)}
    if not _unchanged(folder, key):
        with _answered("evaluate", config, run):
            built, template = load(run, config)
            untuned = partial(as_base, built, run, config)
            with general_set(config.evaluate, config.data, template, run.stage("data")) as general:
                report = compare_models(built, template, sets | general, _asked(config, run), config.data.context, 1, progress, untuned)
        with whole_folder(folder) as temporary:
            write(report, temporary)
            write_manifest(temporary, key)
    return read_json(folder / "report.json")


def ask(config: RunConfig, run: Run, file: Path, progress: Callable[[str], None] = log.info) -> dict[str, Any]:
    """What base and tuned answer to the prompts of a file → `4-evaluate-prompts/FILE.json`."""
    prompts = read_prompts(file)
    built, template = load(run, config)
    untuned = partial(as_base, built, run, config)
    report = answer_prompts(built, template, prompts, str(file), _asked(config, run), progress, untuned) | {"train": training_digest(run)}
    folder = run.folder / PROMPTS
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_json(folder / f"{file.name}.json", report)
    return report


def export(config: RunConfig, run: Run) -> dict[str, Any]:
    """What others read: one folder for each writer → `5-export`."""
    folder = run.stage("export")
    key = {"train": training_digest(run), "export": canonical(config.export)}
    if not _unchanged(folder, key):
        about = read_adapter_header(run.stage("train") / "adapter")
        with _answered("export", config, run), whole_folder(folder) as temporary:
            built, template = load(run, config)
            tuned = Tuned(built, template, config.adapt, about)
            report = export_model(tuned, config.export, temporary, [template.prompt_of(row) for row in prompts(run)])
            write_json(temporary / "report.json", report)
            write_manifest(temporary, key)
    return read_json(folder / "report.json")


# --- what the stages share


def _unchanged(folder: Path, key: dict[str, Any]) -> bool:
    """Whether the stage is not to be done again; says so."""
    done = is_done(folder, key)
    if done and launched_rank() == 0:
        log.info("%s: unchanged", folder)
    return done


def _trained_already(run: Run) -> Outcome | None:
    """How a training ended that is whole; None where there is something to do."""
    manifest = read_manifest(run.stage("train"))
    if manifest is None or not manifest["done"]:
        return None
    if launched_rank() == 0:
        log.info("%s: unchanged", run.stage("train"))
    return Outcome(manifest["about"]["steps"], manifest["about"]["steps"], interrupted=False)


def _answered(phase: str, config: RunConfig, run: Run, here: World | None = None) -> AbstractContextManager[None]:
    """Memory that runs out in this phase of the plan is answered in the plan's words."""
    return answered(Attempt(config, run, here or alone(_device(run)), decided_for), phase)


def _asked(config: RunConfig, run: Run) -> EvaluateConfig:
    """What `[evaluate]` says, with no more prompts at a time than the plan has room for."""
    most = plan_of(run).evaluate_batch or config.evaluate.batch
    return replace(config.evaluate, batch=min(config.evaluate.batch, most))


def _device(run: Run) -> str:
    return plan_of(run).device if (run.stage("plan") / "plan.json").exists() else "cpu"


def load(run: Run | str | Path, config: RunConfig | None = None) -> tuple[Built, Template]:
    """The tuned model of a finished run, in this process, and the template that its prompts are made with."""
    run = run if isinstance(run, Run) else Run(Path(run))
    training_digest(run)
    config = config or config_of(run)
    decided = plan_of(run)
    pretrained, here = find_model(config.model), alone(decided.device)
    weights = open_weights(pretrained)
    built = skeleton(pretrained.config, config.model, config.adapt, decided.alone, here, weights.infos)
    fingerprint = fill(built, weights, config.model, config.adapt, here)
    load_adapter(built.adapters, run.stage("train") / "adapter", fingerprint)
    return built, choose_template(read_tokenizer(pretrained), template_name(config.data), config.data.system)


@contextmanager
def as_base(built: Built, run: Run, config: RunConfig) -> Iterator[None]:
    """Inside the block a loaded model is its untuned base, and outside it what was trained.

    Adapters and new blocks are switched off. Weights of the base that were trained are read again, base and then tuned: one model is in
    memory at a time.
    """
    if built.adapters.holds_base:
        with adapters_off(built):
            yield
        return
    weights, switch = open_weights(find_model(config.model)), built.adapters.switch
    refill(built, weights, alone(built.plan.device))
    before, switch.on = switch.on, False
    try:
        yield
    finally:
        switch.on = before
        load_adapter(built.adapters, run.stage("train") / "adapter", weights.fingerprint())


def open_batches(config: RunConfig, plan: Plan, run: Run, here: World) -> Batches:
    tokens = open_tokens(run.stage("data") / "tokens" / "train")
    return Batches(
        tokens,
        config.data.context,
        config.train.rows_per_step,
        plan.ranks,
        here.rank,
        plan.micro_batch,
        plan.accumulation,
        config.data.seed,
    )


def config_of(run: Run) -> RunConfig:
    """The config that a finished run was trained with."""
    path = run.stage("train") / "config.json"
    saved = read_json(path)
    check_kind(path, saved["burnish"], "config/1")
    return parse_config(saved["config"], path.name)


def plan_of(run: Run) -> Plan:
    return Plan(**read_json(run.stage("plan") / "plan.json"))


def training_digest(run: Run) -> str:
    """A name for what was trained: its bytes. Raises where there is none yet."""
    adapter = tensors_file(run.stage("train") / "adapter")
    if adapter is None:
        raise UserError(
            f"{run.folder} holds no finished training. Run `burnish train` first; an interrupted one is continued by the same command."
        )
    return file_digest(adapter)


def something_held_out(run: Run) -> bool:
    report = read_json(run.stage("data") / "report.json")
    return any(report[name]["rows"] for name in ("unseen_wording", "unseen_section", "general") if name in report)


def prompts(run: Run, count: int = 8) -> list[Row]:
    """A few rows to compare an export with the live model on: held-out ones where there are any."""
    data = run.stage("data")
    return load_rows(data / "unseen_wording.jsonl", count) or load_rows(data / "rows.jsonl", count)


def _watched(built: Built, config: RunConfig, run: Run, here: World) -> Callable[[], float] | None:
    """The loss on the rows for validation, where there are any."""
    tokens = open_tokens(run.stage("data") / "tokens" / "validation")
    return partial(validation_loss, built, tokens, config.data.context, here) if len(tokens) else None


def _names_of_rows(run: Run) -> Callable[[tuple[int, ...]], str]:
    def describe(samples: tuple[int, ...]) -> str:
        tokens = open_tokens(run.stage("data") / "tokens" / "train")
        with StoredRows(run.stage("data") / "rows.jsonl") as rows:
            named = [rows[number].place for sample in samples for number in tokens.rows_of(sample)]
        return ", ".join(named[:20]) + (f" and {len(named) - 20} more" if len(named) > 20 else "")

    return describe
