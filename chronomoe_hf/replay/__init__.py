"""Choices of another pass of the same tokens: kept by content, compared, repeated."""

from chronomoe_hf.replay.engines import vllm_routes

__all__ = ["vllm_routes"]
