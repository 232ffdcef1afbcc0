"""What a cut is, what it costs, and how what stays is refitted."""
