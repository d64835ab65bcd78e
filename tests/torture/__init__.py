"""Whole runs under torture: killed, on full and damaged disks, fed with anything. `benchmarks/torture.py` runs it all.

What each part has found comes back as plain records; a part that has lost something says what.
"""
