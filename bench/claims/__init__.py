"""What ``studies.py`` is made of: a module for each published claim, and what they share."""
