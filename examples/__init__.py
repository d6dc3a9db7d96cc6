"""Own networks, each in a folder with a config file."""
