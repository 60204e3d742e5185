"""The runtime room, the only one that imports ray: training, encoding, the demo."""
