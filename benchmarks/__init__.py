"""Speed and memory of this project on the machine at hand, against a plain baseline and the machine: `python -m benchmarks`."""
