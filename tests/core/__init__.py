"""Tests of hpc/core: pure, but for the files of a temporary folder."""
