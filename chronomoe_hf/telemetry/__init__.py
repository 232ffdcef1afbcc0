"""Telemetry records: events, snapshots with alerts, JSONL."""

from chronomoe_hf.telemetry.alerts import Alert, AlertHistory
from chronomoe_hf.telemetry.events import ExpertState, RoutingEvent
from chronomoe_hf.telemetry.per_expert import read_events, read_windows
from chronomoe_hf.telemetry.reader import next_attempt, read_history, read_jsonl, read_last, read_lines, read_manifest
from chronomoe_hf.telemetry.snapshots import LayerSnapshot, SystemSnapshot
from chronomoe_hf.telemetry.writer import TelemetryWriter, run_manifest

__all__ = [
    "Alert",
    "AlertHistory",
    "ExpertState",
    "LayerSnapshot",
    "RoutingEvent",
    "SystemSnapshot",
    "TelemetryWriter",
    "next_attempt",
    "read_events",
    "read_history",
    "read_jsonl",
    "read_last",
    "read_lines",
    "read_manifest",
    "read_windows",
    "run_manifest",
]
