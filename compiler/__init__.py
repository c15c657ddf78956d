"""paretorch makes trained PyTorch models faster on the hardware at hand, within a quality budget that you state."""
