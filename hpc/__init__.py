"""hpc: from data to a fine-tuned model to an endpoint, as Slurm jobs in Apptainer images."""

__version__ = "0.1.0"
