"""agentckpt: checkpoint, restore, fork and migrate LLM agents."""
