"""Modules, their state and their updates, as pure functions that know no device, engine or file."""
