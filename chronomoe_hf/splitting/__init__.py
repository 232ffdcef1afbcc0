"""Giving idle experts a copy of a busy one: the plan, the weights, the way back."""
