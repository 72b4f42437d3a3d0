"""Tests of hpc/login: pure, with fake programs, and the real CLI on this machine."""
