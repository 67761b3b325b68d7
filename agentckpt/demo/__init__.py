"""``agentckpt demo``: a repair search that is killed, goes on, and is checked against an undisturbed twin."""
