"""Annotations -> records -> conversations and question sets -> batches."""
