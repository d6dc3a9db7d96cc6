"""What the command line does beside training and evaluation."""
