"""The torch backend: torch's own fused and foreach operators."""
