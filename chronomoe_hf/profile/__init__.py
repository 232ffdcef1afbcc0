"""Any checkpoint and some text: the records of a run, without training."""

import sys
import types
from typing import Any

from chronomoe_hf.profile.data import Domain
from chronomoe_hf.profile.records import DomainProfile, ProfileReport
from chronomoe_hf.profile.run import profile

__all__ = ["Domain", "DomainProfile", "ProfileReport", "profile"]


class _Room(types.ModuleType):
    """``chronomoe_hf.profile`` is this room and the function in it; whoever imports the room first, it can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> ProfileReport:
        """See :func:`chronomoe_hf.profile.run.profile`."""
        return profile(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
