"""What recording and governing cost at the shapes of large models: launches, memory, time, and how they grow."""
