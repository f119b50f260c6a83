"""Rows of data -> contrast pairs and splits."""
