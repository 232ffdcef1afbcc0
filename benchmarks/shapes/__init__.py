"""Launches and memory at the widths and depths of large models."""
