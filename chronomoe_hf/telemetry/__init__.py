"""Telemetry records: events, snapshots with alerts, JSONL."""

from chronomoe_hf.telemetry.alerts import Alert, AlertHistory
from chronomoe_hf.telemetry.events import RoutingEvent
from chronomoe_hf.telemetry.experts import ExpertState
from chronomoe_hf.telemetry.manifest import run_manifest
from chronomoe_hf.telemetry.reader import next_attempt, read_jsonl, read_lines, read_manifest
from chronomoe_hf.telemetry.snapshots import LayerSnapshot, SystemSnapshot
from chronomoe_hf.telemetry.writer import TelemetryWriter

__all__ = [
    "Alert",
    "AlertHistory",
    "ExpertState",
    "LayerSnapshot",
    "RoutingEvent",
    "SystemSnapshot",
    "TelemetryWriter",
    "next_attempt",
    "read_jsonl",
    "read_lines",
    "read_manifest",
    "run_manifest",
]
