"""Any checkpoint and some text: the records of a run, without training; users call it ``chronomoe_hf.profile``."""

from chronomoe_hf.profiling.batches import text_batches
from chronomoe_hf.profiling.data import Domain
from chronomoe_hf.profiling.records import DomainProfile, ProfileReport
from chronomoe_hf.profiling.run import profile

__all__ = ["Domain", "DomainProfile", "ProfileReport", "profile", "text_batches"]
