"""Local maths of the layers, on one rank's blocks."""
