"""Speed, memory and accuracy of the operators beside their peers; `python -m benchmarks.run --help`."""
