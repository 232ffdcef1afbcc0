"""Pictures of routing, one renderer for the page, the notebook and a file; and tables and cards. No torch."""

from chronomoe_hf.pictures.picture import Picture, View

__all__ = ["Picture", "View"]
