"""Tests against a real Slurm, sshd and Apptainer on this machine (see tests/cluster)."""
