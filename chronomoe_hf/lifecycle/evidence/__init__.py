"""What is known of every expert: the table that plans and proposals read."""
