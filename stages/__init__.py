"""One file per stage. Each says what it needs, makes and runs; heavy imports only inside `run`."""
