"""Examples of extensions: a network with its config file, and one plugin for each kind of part."""
