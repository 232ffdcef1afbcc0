"""What wrapping and records cost: time, launches, host reads, bytes."""
