"""The scale of the loss in fp16, whose smallest gradients would otherwise be 0 and whose largest number is 65504 (arXiv 1710.03740).

The loss is multiplied before the backward pass, the fp32 gradients of what is trained are divided after it, before they are clipped or
looked at. All scales are powers of 2, so that neither rounds. A gradient that is not finite skips the step and halves the scale; so many
steps without one double it. The norm that decides is of all ranks' gradients together, so all ranks skip or none.
"""

from collections.abc import Iterable

from torch import Tensor

from burnish.errors import UserError

START = 2.0**16
DOUBLED_AFTER = 2000
FLOOR = 1.0
"""Below it the loss is made smaller, not larger: what is not finite then is no matter of the scale."""


class Scaler:
    """Remembers the scale and the steps since it changed. `Scaler(1.0, 0, False)` does nothing."""

    def __init__(self, scale: float, since: int, on: bool) -> None:
        self.scale, self.since, self.on = scale, since, on

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divides gradients in place."""
        if self.on and self.scale != 1.0:
            for gradient in gradients:
                gradient.mul_(1.0 / self.scale)

    def taken(self) -> None:
        """A step's gradient was finite."""
        self.since += self.on
        if self.since >= DOUBLED_AFTER:
            self.scale, self.since = self.scale * 2, 0

    def skipped(self) -> None:
        """A step's gradient was not. Raises a `UserError` where a smaller scale cannot be the answer."""
        self.scale, self.since = self.scale / 2, 0
        if self.scale < FLOOR:
            raise UserError(
                f"fp16: the gradient is not finite even with a loss scaled by {self.scale:g}; the last checkpoint is kept. "
                "This model's numbers are too large for fp16 (at most 65504): train it anew with model.dtype=fp32 and no autocast, or "
                "with model.dtype=bf16 where the GPU has it."
            )


def begin(dtype: str, scale: float, since: int) -> Scaler:
    """The scaler of a run whose products are in `dtype`: off in anything but fp16."""
    return Scaler(scale, since, True) if dtype == "fp16" else Scaler(1.0, 0, False)
