"""Putting the wrapped classes on a model and taking them off: discovery, layers, class swap, folding, saving."""
