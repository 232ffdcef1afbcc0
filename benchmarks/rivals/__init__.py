"""Who counts right, beside other tools."""
