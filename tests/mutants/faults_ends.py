"""Faults of quantized embeddings and head, of autocast, and of the schedule's floor."""

from mutant import Mutant

ENDS, AUTOCAST, SCHEDULE = "model/test_ends.py", "train/test_autocast.py", "train/test_schedule.py"

FAULTS = (
    Mutant(
        "earlier tiles do not shrink when a larger logit comes",
        "model/ends.py",
        "total_K[part] * shrunk_P",
        "total_K[part]",
        (ENDS,),
        "however_it_is_cut",
    ),
    Mutant(
        "the gradient lacks the target's own row", "model/ends.py", ".sub_(own_KH.mul_(slope_K[:, None]))", "", (ENDS,), "however_it_is_cut"
    ),
    Mutant(
        "the cap's slope is missing in the head's gradient",
        "model/ends.py",
        "weights_PC if slope_PC is None else weights_PC.mul_(slope_PC)",
        "weights_PC",
        (ENDS,),
        "however_it_is_cut and capped",
    ),
    Mutant(
        "embeddings lose their scale",
        "model/ends.py",
        "rows.clone() if self.scale == 1 else rows * self.scale",
        "rows",
        (ENDS,),
        "decoded_matrices",
    ),
    Mutant(
        "another format of the ends has the same cache",
        "skeleton.py",
        'if model.ends != "none":\n        key',
        "if False:\n        key",
        (ENDS,),
        "another_format",
    ),
    Mutant("an adapter forgets the ends", "adapt/disk.py", '(header.get("ends", "none"), adapters.ends)', "(0, 0)", (ENDS,), "remembers"),
    Mutant(
        "autocast reaches into the gain",
        "model/linear.py",
        "torch.autocast(device, enabled=False)",
        "torch.autocast(device, torch.get_autocast_dtype(device))",
        (AUTOCAST,),
        "gain",
    ),
    Mutant(
        "fp16 autocast scales no loss",
        "train/run.py",
        "scaler.begin(built.products",
        "scaler.begin(built.plan.dtype",
        (AUTOCAST,),
        "scaled",
    ),
    Mutant(
        "the floor is added and nothing taken for it", "train/schedule.py", "(1.0 - config.lr_floor) * share", "share", (SCHEDULE,), "floor"
    ),
)
