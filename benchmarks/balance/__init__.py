"""What balance costs or pays in loss and evenness."""
