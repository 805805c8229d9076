"""What sharpness costs, and what it gives: the parts of ``price.py``."""
