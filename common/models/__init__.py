"""Loading models, who is on the device now, and weights on their way out."""
