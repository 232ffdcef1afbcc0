"""One text through a model, token by token: which experts every layer chose; users call it ``chronomoe_hf.trace``."""

from chronomoe_hf.tracing.layer import TracedLayer
from chronomoe_hf.tracing.records import Trace
from chronomoe_hf.tracing.run import trace

__all__ = ["Trace", "TracedLayer", "trace"]
