"""Which experts could go: cases and proposals, decided from numbers alone."""
