"""What ``gpu.py`` runs on a GPU: its stages, their clock, and what it writes of them."""
