"""The two state files on disk: whole or absent, verified before anything is changed."""
