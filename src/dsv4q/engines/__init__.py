"""Engines that serve a checkpoint: which load it, what its experts run on, how they are started."""
