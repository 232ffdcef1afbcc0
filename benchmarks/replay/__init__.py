"""What replayed routes do to a GRPO run: mismatch and k3, with a stand-in engine and with vLLM."""
