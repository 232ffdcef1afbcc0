"""Choices of another pass of the same tokens: kept by content, compared, repeated."""
