"""One file for each tool that people train with. Nothing of a tool is imported before it is used."""
