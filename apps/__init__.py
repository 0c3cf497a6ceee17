"""Programs on the layers: the command line, training, the demo."""
