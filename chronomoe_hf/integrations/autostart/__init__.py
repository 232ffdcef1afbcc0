"""The folder that ``chronomoe run`` puts first on PYTHONPATH; it holds nothing but a ``sitecustomize``."""
