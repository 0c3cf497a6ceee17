"""Programs built on the layers: the command line, training, planning, reports, benchmarks, the doctor and the demo."""
