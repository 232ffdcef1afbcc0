"""Holds the file that ms-swift's ``external_plugins`` takes."""
