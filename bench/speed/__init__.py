"""What ``report.py`` is made of, and of which ``sweep.py`` and ``host_time.py`` use parts."""
