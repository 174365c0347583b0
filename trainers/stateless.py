"""What a method without state of its own answers to the contract (`trainers`): its weights are all there is of it."""

from __future__ import annotations

from torch import Tensor, nn

from avstore.errors import ConflictError


class Stateless(nn.Module):
    """A base for methods without bank, queue or counter; one that has some overrides what concerns it."""

    def after_step(self) -> dict[str, float]:
        """Nothing to move."""
        return {}

    def start_epoch(self, epoch: int) -> dict[str, float]:
        """Nothing to prepare."""
        return {}

    def method_state(self) -> dict[str, Tensor]:
        """Nothing beside `state_dict()`."""
        return {}

    def load_method_state(self, state: dict[str, Tensor]) -> None:
        """ConflictError where there is some: it is of another method."""
        if state:
            raise ConflictError(
                f"this method keeps no state, the checkpoint has {', '.join(sorted(state))}",
                "it is of another method",
                "start a new run with --run",
            )
