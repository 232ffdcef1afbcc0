"""Which tokens of a forward are real, for the hooks that read a model beside its recording.

Shape suffixes: T router rows (tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from chronomoe_hf.recording.scope import real_tokens_of


@dataclass
class RealTokens:
    """Remembers of the forward that runs which of its rows are real tokens.

    Args:
        mask_T: bool, of the last forward of the owner; None where its inputs do not say.
    """

    mask_T: Tensor | None = None

    def listen(self, owner: nn.Module) -> Any:
        """Put the hook on the model that gets the attention mask, before its other hooks, and return its handle."""
        return owner.register_forward_pre_hook(self._remember, with_kwargs=True, prepend=True)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask_T = real_tokens_of(module, args, kwargs)


def real_rows(rows: Tensor, real_T: Tensor | None) -> Tensor:
    """Rows of real tokens, detached; all of them where `real_T` is None or of another length."""
    if real_T is None or real_T.shape[0] != rows.shape[0]:
        return rows.detach()
    return rows.detach()[real_T.to(rows.device)]
