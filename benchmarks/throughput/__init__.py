"""What balance is worth where experts are spread over ranks."""
