"""What a run would take on a grid before it runs: memory, words and time, by dry runs of the step itself."""
