"""Faults that the suite must notice: each a change of one place in the package, and the tests that must fail with it.

A row names few and fast tests (1 to 3 seconds), not all that would notice.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """In `file` of the package, `old` becomes `new`; then one of `tests` (files, or `file::test`) must fail."""

    fault: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    keyword: str = ""
    """As for `pytest -k`."""


ADAPTER, PEFT, FORMATS, LINEAR = "adapt/test_adapter.py", "adapt/test_against_peft.py", "model/test_formats.py", "model/test_linear.py"
AFFINE = "model/test_affine.py"
HEAD, FAMILIES, FILL, CACHE = "model/test_head.py", "model/test_families.py", "load/test_fill.py", "load/test_cache.py"
METHODS = "adapt/test_methods.py"
MIXTURE, SETS, NUMBER = "data/test_mixture.py", "data/test_named_sets.py", "evaluate/test_number.py"
RUNS, CONFIG, TRAIN = "test_runs.py", "test_config.py", "train/test_training.py"
OPTIMIZERS, FP16, OFFLOAD = "train/test_optimizers.py", "train/test_fp16.py", "model/test_offload.py"
ROWS = "data/test_conversations.py"

MUTANTS = (
    # the adapter
    Mutant("d scales the bias too", "adapt/adapter.py", "y_TO + base.bias if", "y_TO + base.bias * d_O if", (ADAPTER,), "plain_layer"),
    Mutant("a stale d is used", "adapt/adapter.py", "self.stamp != self.switch.step", "self.stamp == -1", (ADAPTER,), "stale or once"),
    Mutant(
        "the stamp is never renewed", "adapt/adapter.py", "self.d, self.stamp = d_O, self.switch.step", "self.d = d_O", (ADAPTER,), "once"
    ),
    Mutant("the norm's cross term lacks its 2", "adapt/adapter.py", "beta=2 * s", "beta=s", (ADAPTER,), "bound"),
    Mutant("the norm's square of the update lacks an s", "adapt/adapter.py", "alpha=s * s", "alpha=s", (ADAPTER,), "bound"),
    Mutant(
        "the gain is not applied in the backward pass",
        "adapt/adapter.py",
        "in base.tiles(ctx.d)",
        "in base.tiles()",
        (ADAPTER,),
        "plain_layer",
    ),
    Mutant("B's gradient lacks the gain", "adapt/adapter.py", ".to(b_OR.dtype) * ctx.gain", ".to(b_OR.dtype)", (ADAPTER,), "plain_layer"),
    Mutant(
        "m's gradient takes y with its bias",
        "adapt/adapter.py",
        "y_TO = y_TO + base.bias if m_O is not None else y_TO.add_(base.bias)",
        "y_TO.add_(base.bias)",
        (PEFT,),
        "tenth",
    ),
    Mutant(
        "dropout reaches the base too",
        "adapt/adapter.py",
        "_AdaptedProduct.apply(x, low,",
        "_AdaptedProduct.apply(low, low,",
        (ADAPTER,),
        "dropout",
    ),
    Mutant("a zero row divides by zero", "adapt/adapter.py", "torch.where(norm > 0, m_O / norm, 0)", "m_O / norm", (ADAPTER,), "zero_row"),
    Mutant("switched off still adapts", "adapt/adapter.py", "if not self.switch.on:", "if False:", (ADAPTER,), "switched_off"),
    Mutant(
        "m starts at the square of the norm",
        "adapt/adapter.py",
        "local_rows(self.base.norm2).sqrt()",
        "local_rows(self.base.norm2)",
        (ADAPTER,),
        "before_training",
    ),
    Mutant("A depends on no name", "adapt/attach.py", 'f"{seed}/{name}"', 'f"{seed}"', ("adapt/test_attach.py",), "nothing_else"),
    Mutant(
        "magnitudes are kept in bf16",
        "adapt/attach.py",
        "switch, dtype)",
        "switch, torch.bfloat16)",
        ("adapt/test_attach.py",),
        "at_least_fp32",
    ),
    # methods
    Mutant("a new block is not silent", "adapt/expand.py", '("o_proj", "down_proj")', '("o_proj",)', (METHODS,), "zero"),
    Mutant(
        "new blocks answer when switched off",
        "adapt/whole.py",
        "if switch.on else hidden",
        "if True else hidden",
        (METHODS,),
        "switched_off",
    ),
    Mutant(
        "masters are kept in the compute dtype",
        "skeleton.py",
        "chosen, wide(dtype), dtype)",
        "chosen, dtype, dtype)",
        (METHODS,),
        "masters",
    ),
    Mutant(
        "lists by layer keep the base's order",
        "adapt/expand.py",
        "[value[block] for block in sources]",
        "[value[at % depth] for at, _ in enumerate(sources)]",
        (METHODS,),
        "entry_for_each_layer",
    ),
    Mutant(
        "a trained tensor lies in the cache of the base",
        "skeleton.py",
        "filling.kept_out(built.places)",
        "()",
        (METHODS,),
        "cache_of_its_own",
    ),
    Mutant(
        "only one side of a tie is written",
        "adapt/disk.py",
        "for key in keys[1:]}",
        "for key in ()}",
        ("adapt/test_saved_methods.py",),
        "tie",
    ),
    Mutant(
        "a normal A is as wide as a uniform one",
        "adapt/attach.py",
        "a_RI.normal_(0, 1 / math.sqrt(a_RI.shape[0])",
        "a_RI.normal_(0, 1 / math.sqrt(3 * a_RI.shape[1])",
        ("adapt/test_attach.py",),
        "normal_start",
    ),
    # formats and layers
    Mutant(
        "scales are cast to bf16",
        "model/formats/code_book.py",
        "state.absmax.view(count, width // block)",
        "state.absmax.bfloat16().float().view(count, width // block)",
        (FORMATS,),
        "byte_for_byte",
    ),
    Mutant(
        "the fold rounds its scales to bf16",
        "model/formats/base.py",
        "d[:, None].to(torch.float32)",
        "d[:, None].to(torch.bfloat16)",
        (FORMATS,),
        "fold",
    ),
    Mutant("a block crosses rows", "model/formats/code_book.py", "    return block\n", "    return 32\n", (FORMATS,), "refused"),
    Mutant(
        "a zero point is rounded after the search alone",
        "model/formats/solve.py",
        "return z_N.round().clamp(0, levels) if kind",
        "return z_N if kind",
        (AFFINE,),
        "int4_is_nearer",
    ),
    Mutant(
        "the search keeps its last start, not its best",
        "model/formats/solve.py",
        "better = error_N < best[2]",
        "better = error_N < torch.inf",
        (AFFINE,),
        "starts",
    ),
    Mutant("the third bit is lost", "model/formats/bits.py", "pack(codes >> 2, 1)", "pack(codes & 1, 1)", (AFFINE,), "codes_come_back"),
    Mutant(
        "the fold forgets double quantization",
        "model/formats/code_book.py",
        'tensors["bounds"] * d[:, None].to(torch.float32)',
        'tensors["bounds"]',
        (FORMATS,),
        "fold_gives",
    ),
    Mutant(
        "the norm is of the rows before rounding",
        "model/linear.py",
        "dense = self.form.dequantize(tensors, self.block, self.dtype).to(wide(self.dtype))",
        "dense = rows_NI.to(wide(self.dtype))",
        (FORMATS,),
        "compute_dtype",
    ),
    Mutant(
        "tiles lose their last row",
        "model/linear.py",
        "slice(start, min(start + step, self.out_features))",
        "slice(start, min(start + step, self.out_features - 1))",
        (LINEAR,),
        "dense_layer",
    ),
    Mutant(
        "the dense gradient ignores all tiles but the last",
        "model/linear.py",
        "dx_TI.addmm_(g_TO[:, rows], w)",
        "dx_TI = g_TO[:, rows] @ w",
        (LINEAR,),
        "tiles",
    ),
    # the network and its head
    Mutant(
        "the reported loss is summed in bf16",
        "model/head.py",
        "return exact + (loss - loss.detach()).float()",
        "return loss.float()",
        (HEAD,),
        "torchs_own",
    ),
    Mutant(
        "the loss of no target has bf16's dtype",
        "model/head.py",
        "logits_KV = logits_KV.to(wide(logits_KV.dtype))",
        "pass",
        (HEAD,),
        "without_a_target",
    ),
    Mutant(
        "capped logits are not capped",
        "model/head.py",
        "torch.tanh(logits_KV / softcap) * softcap",
        "logits_KV",
        (HEAD,),
        "equal_cross_entropy",
    ),
    Mutant(
        "logits are not scaled",
        "model/network.py",
        "hidden_KH if factor == 1 else hidden_KH * factor",
        "hidden_KH",
        (FAMILIES,),
        "other_dense and granite",
    ),
    Mutant(
        "samples see each other", "model/attention.py", "pairwise(segments)", "[(0, segments[-1])]", (FAMILIES,), "sees_another and llama"
    ),
    Mutant(
        "a window is one too wide",
        "model/attention.py",
        "- position[None, :] < window",
        "- position[None, :] <= window",
        (FAMILIES,),
        "sliding and mistral",
    ),
    Mutant(
        "buffers keep what memory held",
        "model/network.py",
        "model._init_weights(module)",
        "pass",
        (FAMILIES,),
        "no_file_holds and llama-fp32 or fp32-llama",
    ),
    Mutant("the head is left untied", "skeleton.py", "built.model.tie_weights()", "pass", (FILL,), "stay_tied"),
    Mutant("layers hold bytes before the fill", "model/linear.py", "with module.weight.device:", "if True:", (FILL,), "no_bytes"),
    # reading
    Mutant(
        "the last row of a slab is lost",
        "load/fill.py",
        "yield start, min(start + step, last)",
        "yield start, min(start + step, last - 1)",
        (FILL,),
        "cover",
    ),
    Mutant(
        "a tensor without a place is passed over",
        "load/fill.py",
        'problems.append(f"{name}: the model has no place for it")',
        "pass",
        (FILL,),
        "extra",
    ),
    Mutant(
        "a place without a tensor is left as it is",
        "load/fill.py",
        "sources.keys() - weights.infos.keys())]",
        "set())]",
        (FILL,),
        "named_in_one",
    ),
    Mutant("a head of its own is thrown away", "load/fill.py", "    check_tied(places, weights)\n", "", (FILL,), "beside_tied"),
    Mutant("the cache forgets the block", "skeleton.py", '"block": model.block, ', "", (CACHE,), "another_block"),
    Mutant("a damaged cache is trusted", "load/cache.py", "return not damaged", "return True", (CACHE,), "damaged and short"),
    Mutant(
        "a cache is visible before it is whole",
        "load/cache.py",
        'self.folder.name + ".partial"',
        "self.folder.name",
        (CACHE,),
        "stops_in_the_middle or plain_safetensors",
    ),
    # runs
    Mutant(
        "a file is renamed before it is on the disk",
        "runs.py",
        "            _sync(temporary)\n            os.replace(temporary, path)\n",
        "            os.replace(temporary, path)\n            _sync(path)\n",
        (RUNS,),
        "before_it_takes",
    ),
    Mutant("a half written file stays", "runs.py", "temporary.unlink(missing_ok=True)", "pass", (RUNS,), "writer_that_fails"),
    Mutant("an unfinished stage is done", "runs.py", 'manifest["done"] and ', "", (RUNS,), "finished_with_the_same_key"),
    Mutant("an infinite learning rate is taken", "config.py", ", allow_inf_nan=False", "", (CONFIG,), "out_of_range"),
    # training
    Mutant("a share is not divided", "train/step.py", " / step.supervised", "", (TRAIN,), "mean_over"),
    Mutant("a mean of means", "train/step.py", " / step.supervised", " / max(1, len(batch.targets))", (TRAIN,), "its_cut"),
    Mutant("d stays stale after a step", "train/step.py", "    built.adapters.switch.advance()\n", "", (TRAIN,), "stale"),
    Mutant("a gradient that is not finite is learned", "train/step.py", "torch.isfinite(norm) and ", "", (TRAIN,), "gradient_that"),
    Mutant("clipping does nothing", "train/step.py", "    if clip:", "    if clip > 9:", (TRAIN,), "clipping"),
    Mutant(
        "a resume is off by one",
        "train/checkpoint.py",
        "**asdict(state)}",
        '**asdict(state), "position": state.position + 1}',
        (TRAIN,),
        "breaks_off",
    ),
    Mutant(
        "a resume forgets the moments",
        "train/checkpoint.py",
        "            local_rows(tensor).copy_(file",
        "            (tensor.clone() if 'moments' in path.name else local_rows(tensor)).copy_(file",
        (TRAIN,),
        "breaks_off",
    ),
    Mutant("a resume forgets the dropout's draws", "train/checkpoint.py", "if ranks == world.size:", "if False:", (TRAIN,), "breaks_off"),
    Mutant("a resume forgets Adam's count", "train/optimizer.py", "fill_(float(steps_done))", "fill_(0.0)", (TRAIN,), "breaks_off"),
    Mutant("magnitudes decay", "train/optimizer.py", "return parameter.dim() > 1", "return True", (TRAIN,), "decay"),
    Mutant(
        "no save is tried before the first step",
        "train/run.py",
        "        path = checkpoint.save(checkpoints, state, trainable, update, config, world)\n"
        "        checkpoint.load(path, trainable, update, world)\n",
        "",
        (TRAIN,),
        "first_save",
    ),
    # what a file holds already
    Mutant(
        "rows that a file holds in the layer's format are quantized again",
        "model/linear.py",
        "return form == self.format_name and",
        "return False and",
        ("load/test_stored.py",),
        "nothing_is_quantized or very_values",
    ),
    Mutant(
        "query and key rows are taken in llama.cpp's order",
        "load/gguf_reader.py",
        "return stored if source.heads is None else stored[wanted - low]",
        "return stored",
        ("load/test_gguf_reader.py",),
        "rows_of_a_quantized_matrix",
    ),
    Mutant(
        "query and key rows are written in transformers' order",
        "export/gguf_folder.py",
        "    if heads is None:",
        "    if True:",
        ("export/test_gguf_folder.py",),
        "bytes_in_every_tensor",
    ),
    Mutant(
        "the fold rounds scales that training did not round",
        "model/linear.py",
        "self.form.dequantize(self.form.fold(tensors, gain[rows]), self.block, dtype)",
        "self.form.dequantize(tensors, self.block, dtype) * gain[rows, None].to(dtype)",
        ("model/test_gguf_blocks.py",),
        "folded_file",
    ),
    Mutant(
        "nested scales lack what is added to all",
        "load/bitsandbytes_reader.py",
        "] + offset",
        "]",
        ("load/test_quantized_folders.py",),
        "bit_for_bit and nested",
    ),
    Mutant(
        "zero points are unpacked from the first word's first row",
        "load/compressed_tensors_reader.py",
        "[start - first * each : stop - first * each]",
        "[: stop - start]",
        ("load/test_quantized_folders.py",),
        "stand_for",
    ),
    # optimizers, fp16, what waits on the host
    Mutant("B has no rate of its own", "train/optimizer.py", "else own / config.lr", "else 1.0", (OPTIMIZERS,), "own_rates"),
    Mutant("an absmax of another rank", "train/blockwise.py", "absmax[number * per :]", "absmax[:]", (OPTIMIZERS,), "saved_are_decoded"),
    Mutant("gradients stay scaled", "train/step.py", "    scaler.unscale(found)\n", "", (FP16,), "what_one_in_fp32"),
    Mutant("a skipped step leaves the scale", "train/step.py", "        scaler.skipped()\n", "", (FP16,), "skips_the_step"),
    Mutant("a resume counts skipped steps", "train/checkpoint.py", ' - header.get("skipped", 0)', "", (FP16,), "after_a_skipped"),
    Mutant("a sum of losses in fp16", "model/head.py", " or hidden_KH.dtype == torch.float16:", ":", (FP16,), "sum_of_losses"),
    Mutant(
        "two layers share a slot", "model/offload.py", "inside(self.slots[number % 2])", "inside(self.slots[0])", (OFFLOAD,), "every_format"
    ),
    Mutant("a layer that left its slot is read there", "model/offload.py", "piece.linear.near.clear()", "pass", (OFFLOAD,), "overwritten"),
    Mutant("no step is profiled", "train/run.py", "            watched_step()\n", "", ("train/test_watching.py",), "writes_a_trace"),
    # sets, mixtures and what is measured on them
    Mutant(
        "a mixture's counts are cut off", "data/mixture.py", "round(share * int(rows))", "int(share * int(rows))", (MIXTURE,), "exactly"
    ),
    Mutant("a weight is the nearest float", "data/mixture.py", "Fraction(repr(value))", "Fraction(value)", (MIXTURE,), "exactly"),
    Mutant("replay is a share of the own rows", "data/mixture.py", "own_rows / (1 - part)", "own_rows", (MIXTURE,), "its_share"),
    Mutant(
        "rows that come once more are always the first",
        "data/mixture.py",
        'shuffled(len(places.get(name, [])), seed, "mixture", number)[:more]',
        "range(more)",
        (MIXTURE,),
        "another_gives_others",
    ),
    Mutant("a question of rows kept apart is trained", "data/set_rows.py", "if at not in asks_again", "if True", (SETS,), "kept_apart"),
    Mutant(
        "the space before an answer is asked, not trained",
        "data/template.py",
        "+ '### Assistant:' }}\"",
        "+ '### Assistant: ' }}\"",
        (SETS,),
        "guanaco",
    ),
    Mutant("thousands end at their comma", "evaluate/number.py", r"\d{1,3}(?:,\d{3})+(?!\d|,\d)|", "", (NUMBER,), "person"),
    Mutant("a hyphen is a minus", "evaluate/number.py", r"(?<![\w)%.,])(?P<minus>-)", "(?P<minus>-)", (NUMBER,), "person"),
    Mutant(
        "a trained row is measured as general",
        "data/sources.py",
        "if text not in found]",
        "if text in found]",
        ("data/test_sources.py",),
        "tell_nothing",
    ),
    # rows
    Mutant(
        "an answer's end is not learned",
        "data/template.py",
        "mask[first : stop + 1] = [1] * (stop + 1 - first)",
        "mask[first:stop] = [1] * (stop - first)",
        ("data/test_template.py",),
        "exactly_the_answers",
    ),
    Mutant(
        "a text loses the first token of each chunk",
        "data/fit.py",
        "range(0, len(ids) - 1, self.context - 1)",
        "range(0, len(ids) - 1, self.context)",
        (ROWS,),
        "every_token",
    ),
    Mutant(
        "only last turns count as trained",
        "data/held_out.py",
        "np.unique(asked.keys, return",
        "np.unique(asked.last().keys, return",
        (ROWS,),
        "later_turn",
    ),
    Mutant(
        "a fact stands on both sides of a validation",
        "data/held_out.py",
        "among & (rows.facts != 0)",
        "among & (rows.facts == 0)",
        (ROWS,),
        "whole_facts",
    ),
    Mutant(
        "a validation leaves dropout off",
        "train/validate.py",
        "built.model.train(training)",
        "pass",
        ("train/test_validation.py",),
        "no_weight",
    ),
    # the original's command lines and files
    Mutant(
        "DoRA keeps the alpha that the original ignored",
        "compat/mapping.py",
        "float(asked.v.lora_rank)",
        "float(asked.v.lora_alpha)",
        ("compat/test_translate.py",),
        "just_these",
    ),
    Mutant(
        "the GPUs do not count in a step",
        "compat/mapping.py",
        "asked.v.gradient_accumulation_steps * asked.gpus",
        "asked.v.gradient_accumulation_steps",
        ("compat/test_said.py",),
        "articles_command",
    ),
    Mutant(
        "an imported DoRA is scaled as LoRA is",
        "compat/import_state.py",
        'alpha=alpha if layout.method == "lora" else float(rank)',
        "alpha=alpha",
        ("compat/test_import_state.py",),
        "formula",
    ),
    Mutant(
        "old blocks keep their numbers",
        "compat/import_state.py",
        "{places[int(found[2])]}",
        "{found[2]}",
        ("compat/test_import_state.py",),
        "silent",
    ),
)
"""Faults of data and of export belong below theirs."""
