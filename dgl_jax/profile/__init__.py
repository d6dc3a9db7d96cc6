"""Counts and measures what the parts of a run cost: operations, time, memory."""
