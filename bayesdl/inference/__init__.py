"""Engines: one public file for each way of conditioning a model on data."""
