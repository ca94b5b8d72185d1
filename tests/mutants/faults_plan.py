"""Faults of the plan's search and its cost model."""

from mutant import TRACE, Mutant

SEARCH, CHANGES = "plan/test_search.py", "plan/test_changes.py"
GPUS, SHAPES = "plan/test_gpus.py", "plan/test_shapes.py"

FAULTS = (
    Mutant(
        "the phase with most room decides whether a plan fits",
        "plan/search.py",
        "return max(phases, key=",
        "return min(phases, key=",
        (SEARCH,),
        "fastest_of_all",
    ),
    Mutant("a pinned base stays on the GPU", "plan/axes.py", "    if pin:\n", "    if pin and plan.sharded:\n", (SEARCH,), "pin_is_obeyed"),
    Mutant("recomputing is free", "plan/cost.py", "again = 1 / plan.checkpoint_every if", "again = 0.0 if", (GPUS,), "recomputing"),
    Mutant("a change is larger than it must be", "plan/changes.py", "best, high = tried, middle", "high = middle", (CHANGES,), "no_larger"),
    Mutant(
        "what is hopeless has the time of a larger micro-batch",
        "plan/search.py",
        "Tried(one.plan, seconds(config, one.plan, machine, measure), hopeless)",
        "replace(one, tight=hopeless)",
        (SEARCH,),
        "its_own",
    ),
    Mutant("a plan may leave nothing", "plan/search.py", "ROOM = 0.99", "ROOM = 2.0", (SEARCH,), "leaves_nothing"),
    Mutant(
        "more contexts at a time than there are",
        "plan/axes.py",
        "min(config.plan.micro_batch, share(config, plan))",
        "config.plan.micro_batch",
        (SEARCH,),
        "even_where",
    ),
    Mutant(
        "what waits while training waits ever after",
        "plan/phases.py",
        "(False, True) if movable",
        "(True,) if movable",
        ("plan/test_host_memory.py",),
        "only_while",
    ),
    Mutant(
        "more of the same is offered instead",
        "plan/report.py",
        "there.get(need.place, 0) >= need.bytes",
        "there.get(need.place, 0) > 2 * need.bytes",
        ("plan/test_plan_command.py",),
        "more_of_the_same",
    ),
    Mutant(
        "what cannot be loaded is measured first",
        "plan/changes.py",
        "return sorted(loads, key=lambda one: tightest(one[0]).share)",
        "return loads",
        (CHANGES,),
        "without_measuring",
    ),
    Mutant(
        "a change that needs as much is said to help",
        "plan/changes.py",
        "left(change) <= LESS * asked.bytes",
        "left(change) <= asked.bytes",
        (CHANGES,),
        "needs_no_less",
    ),
    Mutant(
        "a change does not ask what comes after training",
        "plan/changes.py",
        "if tight.fits else ()\n",
        "if False else ()\n",
        ("plan/test_host_memory.py",),
        "after_training",
    ),
    Mutant(
        "nobody waits in an uneven step", "plan/reasons.py", "if rows % ranks else", "if False else", ("plan/test_decide.py",), "who_waits"
    ),
    Mutant(
        "a copy on the hub is taken for the original",
        "plan/shapes.py",
        "shape is None or ",
        "shape is None or False and ",
        (SHAPES,),
        "own_config",
    ),
    Mutant(
        "more prompts are answered at a time than the plan has room for",
        "pipeline.py",
        "batch=min(config.evaluate.batch, most)",
        "batch=config.evaluate.batch",
        ("test_pipeline.py",),
        "no_more_prompts",
    ),
    Mutant(
        "the base stays on the GPU when it is evaluated",
        "config.py",
        "offload_base=self.offload_base_after)",
        "offload_base=self.offload_base)",
        ("test_pipeline.py",),
        "base_in_host_memory",
    ),
    Mutant(
        "the other processes hold nothing while one saves",
        "plan/phases.py",
        "(here - 1) * sum(",
        "0 * sum(",
        ("plan/test_decide.py",),
        "holds_what_is_saved",
    ),
    Mutant(
        "m's products are a CPU's in a GPU's plan",
        "plan/trace.py",
        "head.LOGIT_BYTES, PRODUCT_BYTES)",
        "head.LOGIT_BYTES)",
        (TRACE,),
        "pieces_of",
    ),
)
