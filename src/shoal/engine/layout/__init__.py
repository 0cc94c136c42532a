"""One replica of the model over several ranks, on PyTorch's own parts; the rest of the engine sees a `Replica`."""
