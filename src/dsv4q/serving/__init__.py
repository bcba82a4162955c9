"""Measuring a server of a model from outside: an OpenAI-compatible one, over HTTP."""
