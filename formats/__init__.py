"""Checkpoint formats: bytes on disk <-> schemes. One format a module; no format knows another, a solver or a kernel."""
