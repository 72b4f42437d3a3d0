"""What all three places share: plain data, the plan, the files of a run. Standard library only."""
