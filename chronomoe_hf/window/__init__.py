"""The host's part of a window: events, snapshot, decisions, records; no collective."""
