"""Loading batches with workers: what is under :class:`torchwq.DataLoader`."""
