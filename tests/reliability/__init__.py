"""Tests with kills, full disks, clock jumps and faults: no accepted request is lost."""
