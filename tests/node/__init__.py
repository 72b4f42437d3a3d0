"""Tests of hpc/node: pure, and with real child processes."""
