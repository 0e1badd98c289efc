"""A checkpoint that people and programs can ask: on the command line, over HTTP, as an MLflow model, under Ray Serve.

One way from a query to an answer (`assistant.py`); the others are doors to it.
"""
