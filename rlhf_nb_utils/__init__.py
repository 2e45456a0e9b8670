"""RLHF in notebooks."""
