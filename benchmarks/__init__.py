"""Speed, memory and accuracy of the operators beside their peers; `python -m liger_ops bench --help`."""
