"""A live model's experts: read, masked, fitted; every bit comes back."""
