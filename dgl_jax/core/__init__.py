"""Modules, their state and one update of it: pure functions that know no device, engine or file."""
