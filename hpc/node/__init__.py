"""The compute node, outside the image. Standard library only."""
