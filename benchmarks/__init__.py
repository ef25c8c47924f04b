"""Measurements: speed and fidelity. Nothing here is a test; tests hold short forms of what must never break."""
