"""The pipelines: which step follows which, with what, on what. Nothing is computed here."""
