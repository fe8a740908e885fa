"""Plain PyTorch definitions of the operators: no cleverness, differentiable, in any dtype.

Tests compare with them in float64, benchmarks use them to check every provider before timing it.
"""
