"""For ms-swift's ``external_plugins``: makes ``callbacks: chronomoe`` a word that it knows."""

from __future__ import annotations

from swift.callbacks.mapping import callbacks_map

from chronomoe_hf.integrations.swift import callback

callbacks_map["chronomoe"] = callback
