"""What the lifecycle does in the middle of a run, on a live system."""
