"""Loading models, moving them to and from the device, and exporting weights."""
