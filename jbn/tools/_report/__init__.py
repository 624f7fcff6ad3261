"""What the running statistics of a model look like, and how far batches are from them."""
