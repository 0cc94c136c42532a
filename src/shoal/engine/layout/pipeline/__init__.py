"""The pipeline axis: a model traced, cut where it costs least, and run by torch.distributed.pipelining's schedules."""
