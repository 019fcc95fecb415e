"""Compare this trainer with TRL's experimental A2PO and TRL's GRPO on the same work: python -m benchmarks.peers."""
