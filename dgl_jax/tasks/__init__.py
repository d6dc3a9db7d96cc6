"""What the examples of a data set are, and what happens to them on the device."""
