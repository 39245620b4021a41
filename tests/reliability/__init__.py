"""Kills, full disks, clocks, faults: nothing accepted is lost."""
