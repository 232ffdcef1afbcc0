"""What one forward adds up, without a host read: which forwards count, which rows are real, sums, expert outputs."""
