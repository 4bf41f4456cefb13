"""Checks before processes start, and the processes of one machine."""
